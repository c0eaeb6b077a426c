"""Answers of finished pairs may leave the ledger; what anything still needs stays, or is refused in one line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pairs import label, pair, plan, reference
from sqlalchemy import event
from typer.testing import CliRunner

from pilaf_ray.cli import app
from pilaf_ray.errors import LedgerError
from pilaf_ray.sampling.identity import is_held_out
from pilaf_ray.store.database import LedgerDatabase
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.queries import CONTENTS
from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.store.records import HUMAN
from pilaf_ray.store.tables import pairs

STEPS = 10
BATCH = 2


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'preferences.db'}"


@pytest.fixture
def ledger(url: str) -> Iterator[PreferenceLedger]:
    """Twenty pairs, two a step, each sampled under the weights of the step before; two more are open."""
    opened = PreferenceLedger(url)
    for step in range(1, STEPS + 1):
        indices = [BATCH * (step - 1), BATCH * (step - 1) + 1]
        finish(opened, step, indices)
    opened.add_plans([plan(20), plan(21)])
    opened.add_responses([pair(20, version=9)])
    yield opened
    opened.close()


def finish(ledger: PreferenceLedger, step: int, indices: list[int], source: str = "function") -> None:
    ledger.add_plans([plan(i) for i in indices])
    ledger.add_responses([pair(i, version=step - 1) for i in indices])
    ledger.add_labels([label(i, source=source) for i in indices], [reference(i) for i in indices])
    ledger.mark_trained(step, [f"pair-{i}" for i in indices])


def with_answers(url: str) -> list[int]:
    database = LedgerDatabase(url, read_only=True)
    with database.reading() as connection:
        rows = connection.execute(CONTENTS.order_by(pairs.c.plan_index)).all()
    database.close()
    return [row.plan_index for row in rows if row.response_a is not None]


def test_answers_up_to_a_step_go_and_everything_else_stays(ledger: PreferenceLedger, url: str) -> None:
    before, open_before = ledger.counts().check(), ledger.unfinished()
    assert ledger.compact(4, 0, 0.0) == 8
    assert with_answers(url) == [*range(8, 21)]
    assert ledger.counts().check() == before
    assert ledger.unfinished() == open_before
    reader = LedgerReader(url)
    assert [len(reader.labels(f"pair-{i}")) for i in range(20)] == [1] * 20
    assert {item.pair.plan.index for item in reader.trained_sample(99)} == {*range(8, 20)}
    assert [item.pair.plan.index for item in reader.trained_at(5)] == [8, 9]
    with pytest.raises(LedgerError, match=r"answers of step 4 were dropped \(store.compact_after_steps\)"):
        reader.trained_at(4)
    reader.close()


def test_later_calls_go_on_where_the_last_one_ended_also_in_a_new_writer(ledger: PreferenceLedger, url: str) -> None:
    assert [ledger.compact(step, 0, 0.0) for step in (2, 2, 3, 1, 5)] == [4, 0, 2, 0, 4]
    again = PreferenceLedger(url)
    assert [again.compact(step, 0, 0.0) for step in (5, 6)] == [0, 2]
    again.close()


def test_what_could_not_be_committed_is_tried_again(ledger: PreferenceLedger, url: str) -> None:
    class FullError(Exception):
        """No room on the disk."""

    def full(*_: object) -> None:
        raise FullError

    event.listen(ledger._database._engine, "commit", full)
    with pytest.raises(FullError):
        ledger.compact(4, 0, 0.0)
    event.remove(ledger._database._engine, "commit", full)
    assert with_answers(url) == [*range(21)]
    assert ledger.compact(4, 0, 0.0) == 8


def test_going_back_behind_what_was_dropped_is_refused_and_changes_nothing(ledger: PreferenceLedger, url: str) -> None:
    ledger.compact(4, 0, 0.0)
    with pytest.raises(LedgerError, match=r"cannot go back to step 3: answers of pairs up to step 4 were dropped"):
        ledger.reset_after(3)
    assert ledger.counts().by_state == LedgerReader(url).counts().by_state
    # Pairs of steps after 4 come back, sampled under weights that are gone for the most part.
    ledger.reset_after(4)
    left = ledger.unfinished()
    assert [item.pair.plan.index for item in left.labeled] == [8, 9]
    assert len(left.planned) == 12


@pytest.mark.parametrize("step", [6, 8])
def test_the_replay_window_of_each_checkpoint_stays(ledger: PreferenceLedger, step: int) -> None:
    held_out = 0.3
    assert ledger.compact(6, 5, held_out) > 0
    ledger.reset_after(step)
    window = [item.pair.plan.index for item, _ in ledger.reward_window(5, held_out)]
    assert window == [i for i in range(BATCH * step) if not is_held_out(f"pair-{i}", held_out)][-5:]
    with pytest.raises(LedgerError, match=r"were dropped .* under a smaller reward_model.replay.window_pairs"):
        ledger.reward_window(12, held_out)


def test_answers_that_people_judged_are_never_dropped(url: str) -> None:
    ledger = PreferenceLedger(url)
    finish(ledger, 1, [0, 1])
    finish(ledger, 2, [2, 3], source=HUMAN)
    finish(ledger, 3, [4, 5])
    assert ledger.compact(3, 0, 0.0) == 4
    assert with_answers(url) == [2, 3]
    ledger.close()


def test_pairs_that_ended_untrained_are_dropped_too(url: str) -> None:
    ledger = PreferenceLedger(url)
    ledger.add_plans([plan(0), plan(1), plan(2)])
    ledger.add_responses([pair(0), pair(1, version=3)])
    abstentions = [replace(label(i), probability=None, reason="no clear winner") for i in (0, 1)]
    ledger.add_labels(abstentions, [reference(0), reference(1)])
    ledger.reject("pair-2", "poison")
    assert ledger.compact(2, 0, 0.0) == 1
    assert with_answers(url) == [1], "a checkpoint of step 2 plans pair 1 anew"
    ledger.close()


def test_an_export_says_what_is_missing_or_leaves_it_out(ledger: PreferenceLedger, tmp_path: Path) -> None:
    ledger.compact(4, 0, 0.0)
    (tmp_path / "config.json").write_text(json.dumps({"oracle": {"type": "function"}, "store": {"url": None}}))
    words = ["pairs", "export", str(tmp_path), "-o", str(tmp_path / "out.jsonl")]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, LedgerError) and "add --kept" in str(refused.exception)
    done = CliRunner().invoke(app, [*words, "--kept"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line)["plan_index"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [*range(8, 20)]
