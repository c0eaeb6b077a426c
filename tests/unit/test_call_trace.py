"""Calls on one time axis: written while they happen, read back as a timeline."""

import asyncio
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from benchmarks.timeline import Call, busy_share, draw, lanes, main, read_trace, window, within
from pilaf_ray.observability.call_trace import CallTrace, traced


def seconds() -> Iterator[float]:
    return map(float, count())


async def test_calls_that_overlap_and_fail_are_written_with_their_times(tmp_path: Path) -> None:
    ticks = seconds()
    file = tmp_path / "trace.json"

    async def work(role: str, name: str) -> None:
        with traced(role, name):
            await asyncio.sleep(0)

    with CallTrace(file, clock=lambda: next(ticks)):
        await asyncio.gather(work("oracle-0", "label"), work("reference-0", "score"), work("oracle-0", ""))
        with pytest.raises(ValueError, match="broken"), traced("learner rank 0", "train_step"):
            raise ValueError("broken")
    await work("oracle-0", "label")
    text = file.read_text()
    assert read_trace(text) == [
        Call(role="oracle-0", name="label", begin=0.0, end=2.0),
        Call(role="reference-0", name="score", begin=1.0, end=3.0),
        Call(role="learner rank 0", name="train_step", begin=4.0, end=5.0),
    ]
    # What Chrome needs of each event.
    first = json.loads(text.splitlines()[1].rstrip(","))
    assert {"ph": "b", "cat": "oracle-0", "name": "label", "id": 0, "ts": 0}.items() <= first.items()


def test_a_continued_run_goes_on_in_the_same_array(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    for _ in range(2):
        with CallTrace(file), traced("oracle-0", "label"):
            pass
    assert len(read_trace(file.read_text())) == 2


def step(begin: float, end: float) -> Call:
    return Call(role="policy learner rank 0", name="train_step", begin=begin, end=end)


def generation(begin: float, end: float) -> Call:
    return Call(role="generator-0", name="generate", begin=begin, end=end)


STEPS = [step(0, 9), step(10, 19), step(20, 29), step(30, 39), step(40, 49)]
SAMPLED = [generation(5, 22), generation(21, 24), generation(26, 35), generation(50, 60)]


def test_the_window_is_a_step_in_the_middle_and_calls_are_cut_to_it() -> None:
    begin, end = window(STEPS)
    assert (begin, end) == (20, 30)
    found = within([*STEPS, *SAMPLED], begin, end)
    assert found["policy learner rank 0"] == [step(20, 29)]
    assert found["generator-0"] == [generation(20, 22), generation(21, 24), generation(26, 30)]
    assert busy_share(found["generator-0"], begin, end) == pytest.approx(0.8)
    assert busy_share(found["policy learner rank 0"], begin, end) == pytest.approx(0.9)
    assert lanes(found["generator-0"]) == [[generation(20, 22), generation(26, 30)], [generation(21, 24)]]
    with pytest.raises(ValueError, match="3 steps are too few"):
        window(STEPS[:3])


def test_it_is_drawn(tmp_path: Path) -> None:
    shares = draw([*STEPS, *SAMPLED], tmp_path / "timeline.png", steps=1, title="a step")
    assert shares == pytest.approx({"generator-0": 0.8, "policy learner rank 0": 0.9})
    assert (tmp_path / "timeline.png").stat().st_size > 1000


def test_what_is_drawn_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ticks = iter(float(time) for call in [*STEPS, *SAMPLED] for time in (call.begin, call.end))
    trace, results = tmp_path / "trace.json", tmp_path / "timeline.json"
    with CallTrace(trace, clock=lambda: next(ticks)):
        for call in [*STEPS, *SAMPLED]:
            with traced(call.role, call.name):
                pass
    main(trace=trace, output=tmp_path / "timeline.png", file=results)
    kept = json.loads(results.read_text())
    assert json.loads(capsys.readouterr().out).items() <= kept.items()
    assert kept["busy"] == {"generator-0": 0.8, "policy learner rank 0": 0.9}
    assert kept["calls"]["policy learner rank 0"] == [{"name": "train_step", "begin": 0.0, "end": 9.0}]
    assert kept["calls"]["generator-0"][0] == {"name": "generate", "begin": 0.0, "end": 2.0}
