"""What benchmarks.end_to_end makes of the systems' seconds, by hand."""

import pytest

from benchmarks.end_to_end import ASYNCHRONOUS, SYNCHRONOUS, TRL, Timing, compare, over_the_rounds, utilization


def test_rates_ratios_and_the_bound_of_asynchrony() -> None:
    found = {
        ASYNCHRONOUS: Timing(step_seconds=[4.0, 6.0]),
        SYNCHRONOUS: Timing(step_seconds=[9.0], role_seconds={"generator": 4.0, "reference": 1.0, "learner": 4.0}),
        TRL: Timing(step_seconds=[20.0, 20.0]),
    }
    comparison = compare(found, pairs=10, max_staleness_steps=2)
    assert comparison.pairs_per_second == pytest.approx({ASYNCHRONOUS: 2.0, SYNCHRONOUS: 10 / 9, TRL: 0.5})
    assert comparison.over_trl == pytest.approx({ASYNCHRONOUS: 4.0, SYNCHRONOUS: 20 / 9, TRL: 1.0})
    assert comparison.speedup == pytest.approx(1.8)
    assert comparison.bound == pytest.approx(9 / 4)
    assert compare(found, pairs=10, max_staleness_steps=1).bound == 2.0


def test_without_trl_nothing_stands_over_it() -> None:
    sync = Timing(step_seconds=[3.0], role_seconds={"learner": 2.0})
    comparison = compare({ASYNCHRONOUS: Timing(step_seconds=[2.0]), SYNCHRONOUS: sync}, pairs=1, max_staleness_steps=0)
    assert comparison.over_trl == {}
    assert comparison.speedup == 1.5


def test_utilisation_is_the_mean_over_steps() -> None:
    lines = [
        {"loss": 1.0, "busy/learner": 1.0, "busy/oracle": 0.25},
        {"loss": 2.0, "busy/learner": 0.5, "busy/oracle": 0.75},
    ]
    assert utilization(lines) == {"learner": 0.75, "oracle": 0.5}


def test_rounds_are_compared_within_themselves() -> None:
    def round_with(ours: float, theirs: float) -> dict[str, Timing]:
        return {
            ASYNCHRONOUS: Timing(step_seconds=[ours]),
            SYNCHRONOUS: Timing(step_seconds=[2 * ours], role_seconds={"generator": ours, "learner": ours}),
            TRL: Timing(step_seconds=[theirs]),
        }

    rounds = [round_with(2.0, 3.0), round_with(20.0, 50.0), round_with(4.0, 4.0)]
    found = over_the_rounds([compare(one, pairs=1, max_staleness_steps=2) for one in rounds])
    assert found["median"][f"over_trl: {ASYNCHRONOUS}"] == pytest.approx(1.5)
    assert found["range"][f"over_trl: {ASYNCHRONOUS}"] == pytest.approx([1.0, 2.5])
    assert found["median"]["of_bound"] == pytest.approx(1.0)
    assert found["median"]["speedup"] == pytest.approx(2.0)
