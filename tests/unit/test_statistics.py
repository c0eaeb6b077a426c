"""Intervals against hand-computed values and their promised coverage."""

import math

import numpy as np
import pytest

from pilaf_ray.evaluation.statistics import bootstrap_mean, bootstrap_prompts, percentile_interval


def test_equal_values_have_an_interval_of_no_width() -> None:
    interval = bootstrap_mean([2.0, 2.0, 2.0])
    assert (interval.value, interval.low, interval.high) == (2.0, 2.0, 2.0)


def test_a_seed_gives_one_interval() -> None:
    values = list(np.random.default_rng(0).normal(size=40))
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_intervals_cover_the_mean_as_often_as_they_promise(draw: str) -> None:
    rng = np.random.default_rng(1)
    truth = {"normal": 0.0, "exponential": 1.0}[draw]
    trials = 300
    hits = 0
    for trial in range(trials):
        values = getattr(rng, draw)(size=64)
        interval = bootstrap_mean(list(values), seed=trial, resamples=500)
        hits += interval.low <= truth <= interval.high
    # 0.95 nominal; three binomial standard errors below, and the known shortfall of small skewed samples.
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials) - 0.02 < hits / trials < 0.995


def test_bootstrap_over_prompts_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(size=400)
    interval = bootstrap_prompts(lambda rows: float(values[rows].mean()), prompts=400, seed=0, resamples=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_undefined_draws_leave_no_interval() -> None:
    interval = percentile_interval(1.0, [math.nan, math.nan, 1.0])
    assert math.isnan(interval.low) and math.isnan(interval.high)
