"""The control plane's benchmark with small numbers: its figures fit together."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import control_plane
from benchmarks.arithmetic import Latencies
from benchmarks.control_plane import Cluster, Settings, ceilings, measure, overlap

CLUSTER = Cluster(generators=2, slots=4, oracles=1, references=1, ranks=2, tokens=4, length_spread=0.5)
AT_ONCE = Settings(steps=4, batch_pairs=8, max_staleness_steps=1, label_batch_pairs=4)
TIMED = Settings(
    steps=4,
    batch_pairs=8,
    max_staleness_steps=1,
    label_batch_pairs=4,
    latencies=Latencies(response=0.01, label=0.001, reference=0.001, step=0.03, push=0.005, pull=0.005),
)


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """A run looks for garbage in cycles more seldom than tests do."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_every_pair_is_trained_once_in_a_few_transactions(where: str, tmp_path: Path) -> None:
    found = measure(AT_ONCE, CLUSTER, where=where, folder=tmp_path, profile=False)
    assert found.pairs == 4 * 8
    # Each step is marked, plans, responses and labels are written in groups, and the last one counts.
    assert AT_ONCE.steps + 3 < found.transactions <= 3 * found.pairs + AT_ONCE.steps + 1
    assert 0 < found.step_seconds <= found.seconds and found.controller_cpu > 0 and found.ledger_cpu > 0
    assert list(tmp_path.iterdir()) == [], "the ledger of a run is its own, and gone"


def test_a_ceiling_is_told_for_each_ledger_and_setting(tmp_path: Path) -> None:
    rows = ceilings([AT_ONCE], CLUSTER, folder=tmp_path, repetitions=1, profile=False)
    assert [(row["ledger"], row["pairs"], row["in_flight"]) for row in rows] == [("disk", 32, 16), ("memory", 32, 16)]


def test_the_overlap_stands_beside_a_bound_that_counts_controller_and_ledger(tmp_path: Path) -> None:
    found = overlap(TIMED, CLUSTER, folder=tmp_path, repetitions=1)
    roles, control = found["role_seconds"], sum(found["control_seconds"].values())
    assert control > 0
    parts = [*roles.values(), control]
    assert found["bound"] == min(sum(parts) / max(parts), 2.0) and found["bound"] >= 1.0
    assert found["of_bound"] == found["speed_up"] / found["bound"]
    (synchronous,), (asynchronous,) = found["step_seconds"].values()
    assert found["speed_ups"] == [synchronous / asynchronous]
    # A timer rings late, never early: one after the other they take at least their own times.
    assert asynchronous >= TIMED.latencies.step
    assert synchronous >= TIMED.latencies.step + TIMED.latencies.push + TIMED.latencies.pull


@pytest.mark.parametrize(
    ("share", "drawn"), [(0.0, "responses 0.01 s each"), (0.5, "responses 0.005 to 0.015 s, even")]
)
def test_results_say_what_was_drawn_and_are_written(
    share: float, drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"generators": 2, "slots": 4, "oracles": 1, "references": 1, "ranks": 1, "tokens": 4}
    times = {"response_seconds": 0.01, "label_seconds": 0.0, "reference_seconds": 0.0, "step_seconds": 0.01}
    times |= {"push_seconds": 0.0, "pull_seconds": 0.0}
    control_plane.main(
        pairs=8, batch=4, staleness=1, label_batch=[4], overlap_steps=3, overlap_batch=4, length_spread=share,
        repetitions=1, folder=tmp_path, profile=False, file=tmp_path / "found.json", **small, **times,
    )  # type: ignore[arg-type]  # fmt: skip
    printed = capsys.readouterr()
    assert drawn in printed.err and "of the bound of" in printed.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads(printed.out)
    assert found["length_spread"] == found["overlap"]["length_spread"] == share
