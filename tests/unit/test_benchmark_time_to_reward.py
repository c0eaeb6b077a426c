"""What benchmarks.time_to_reward makes of curves, by hand."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import time_to_reward
from benchmarks.end_to_end import ASYNCHRONOUS, SYNCHRONOUS, TRL
from benchmarks.time_to_reward import Point, Round, Spread, over_the_rounds, result, run_round, seconds_to


def test_a_reward_between_two_evaluations_is_reached_on_the_line_between_them() -> None:
    curve = [
        Point(step=0, seconds=0.0, reward=1.0),
        Point(step=5, seconds=50.0, reward=2.0),
        Point(step=10, seconds=90.0, reward=1.5),
        Point(step=15, seconds=150.0, reward=3.5),
    ]
    assert seconds_to(0.5, curve) == 0.0
    assert seconds_to(1.25, curve) == pytest.approx(12.5)
    assert seconds_to(2.5, curve) == pytest.approx(120.0)
    assert seconds_to(4.0, curve) is None


def line(seconds: float, reward: float) -> list[Point]:
    """From reward 0 at 0 seconds."""
    return [Point(step=0, seconds=0.0, reward=0.0), Point(step=5, seconds=seconds, reward=reward)]


def test_medians_and_ranges_over_the_rounds() -> None:
    rounds = [Round(seed=n, curves={TRL: line(seconds, 2.0)}) for n, seconds in enumerate((40.0, 80.0, 20.0))]
    found = over_the_rounds(rounds, [1.0, 2.5])[TRL]
    assert found["1"] == Spread(median=20.0, least=10.0, most=40.0)
    assert found["1"].shown(0) == "20 (10 to 40)"
    assert found["2.5"] == Spread(median=None, least=None, most=None)
    assert found["2.5"].shown(0) == "–"


def test_a_reward_that_a_round_does_not_reach_comes_after_all_others() -> None:
    rounds = [Round(seed=n, curves={TRL: line(10.0, reward)}) for n, reward in enumerate((2.0, 1.0, 4.0))]
    spread = over_the_rounds(rounds, [2.0])[TRL]["2"]
    assert spread == Spread(median=10.0, least=5.0, most=None)
    assert spread.shown(0) == "10 (5 to –)"
    assert Spread.of([1.0, None]).median is None


def test_one_round_is_told_alone_and_several_with_every_curve() -> None:
    one, other = (Round(seed=seed, curves={TRL: line(seconds, 2.0)}) for seed, seconds in ((3, 10.0), (4, 30.0)))
    alone = result([one], [1.0])
    assert alone["seconds_to"] == {TRL: {"1": 5.0}}
    assert alone["curves"][TRL][1] == {"step": 5, "seconds": 10.0, "reward": 2.0}
    assert set(alone) == {"seconds_to", "curves"}
    both = result([one, other], [1.0])
    assert both["median"] == {TRL: {"1": 10.0}}
    assert both["range"] == {TRL: {"1": [5.0, 15.0]}}
    assert both["rounds"][0] == {"seed": 3, **alone}
    assert both["rounds"][1]["curves"][TRL][1]["seconds"] == 30.0


def test_a_round_gives_all_systems_its_seed_and_one_no_staleness(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def curve(_config: Path, words: Sequence[str], *_: object) -> list[Point]:
        asked.append(list(words))
        return line(1.0, 1.0)

    monkeypatch.setattr(time_to_reward, "pilaf_ray_curve", curve)
    monkeypatch.setattr(time_to_reward, "trl_curve", curve)
    found = run_round(Path("c.yaml"), ["a=1"], seed=7, steps=5, synchronous=True)
    assert list(found.curves) == [ASYNCHRONOUS, SYNCHRONOUS, TRL]
    seeded = ["a=1", "run.seed=7"]
    assert asked == [seeded, [*seeded, "pipeline.max_staleness_steps=0"], seeded]
    assert list(run_round(Path("c.yaml"), [], seed=7, steps=5, synchronous=False).curves) == [ASYNCHRONOUS, TRL]
