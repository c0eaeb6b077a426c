"""Slopes of memory: what is flat is called flat, what grows is found."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import Reading, Series, by_role, draw, slope, write_csv


def readings(growth: float, *, seed: int, warm_up: float = 400.0) -> Series:
    """An hour, one reading every ten seconds: a steep start, then ``growth`` MiB an hour in noise of 2 MiB."""
    rng = np.random.default_rng(seed)
    seconds = np.arange(0.0, 3600.0, 10.0)
    start = warm_up * np.minimum(seconds / 900.0, 1.0)
    noise = np.convolve(rng.normal(0.0, 2.0, len(seconds)), np.ones(5) / 5, mode="same")
    return list(zip(seconds.tolist(), (1000.0 + start + growth * seconds / 3600 + noise).tolist(), strict=True))


def test_the_interval_holds_the_true_slope_about_as_often_as_it_says() -> None:
    for growth in (0.0, 30.0):
        found = [slope(readings(growth, seed=seed), draws=200) for seed in range(40)]
        held = sum(interval.low <= growth <= interval.high for interval in found)
        assert held >= 33, growth
        assert np.mean([interval.value for interval in found]) == pytest.approx(growth, abs=0.5)


def test_a_start_that_fills_caches_is_no_slope() -> None:
    assert abs(slope(readings(0.0, seed=1)).value) < 5.0


def test_too_few_readings_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for a slope"):
        slope([(float(second), 1.0) for second in range(12)])


def test_readings_are_written_and_drawn(tmp_path: Path) -> None:
    found = [
        Reading(seconds=10.0 * number, step=number, role=role, processes=1, mib=100.0 + number)
        for number in range(30)
        for role in ("learner", "oracle")
    ]
    series = by_role(found)
    assert {role: len(values) for role, values in series.items()} == {"learner": 30, "oracle": 30}
    write_csv(found, tmp_path / "soak.csv")
    assert (tmp_path / "soak.csv").read_text().splitlines()[:2] == [
        "seconds,step,role,processes,mib",
        "0.0,0,learner,1,100.0",
    ]
    draw(series, {role: slope(values) for role, values in series.items()}, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
