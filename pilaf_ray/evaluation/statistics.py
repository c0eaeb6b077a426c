"""Means, their standard errors, and bootstrap intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.int64]]

LEVEL = 0.95
"""Confidence of every interval."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, from the unbiased variance; needs two values."""
    centre = mean(values)
    variance = sum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of after − before on the same prompts, and its standard error."""
    gains = [b - a for a, b in zip(before, after, strict=True)]
    return mean(gains), standard_error(gains)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """The mean with its bias-corrected and accelerated (BCa) interval.

    The values must be independent of each other: one a prompt. Equal values give an interval of no width.
    """
    column = np.asarray(values, dtype=np.float64)
    if len(column) < 2 or np.ptp(column) == 0.0:
        return Interval(float(column.mean()), float(column.mean()), float(column.mean()))
    from scipy.stats import bootstrap

    found = bootstrap(
        (column,), np.mean, n_resamples=resamples, confidence_level=LEVEL, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(float(column.mean()), float(found.low), float(found.high))


def bootstrap_prompts(
    statistic: Callable[[Rows], float], *, prompts: int, seed: int = 0, resamples: int = 1000
) -> Interval:
    """Any statistic of whole prompts, with its percentile interval.

    ``statistic`` takes the indices of the prompts that are drawn; on ``arange(prompts)`` it gives the estimate.
    """
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(0, prompts, size=prompts)) for _ in range(resamples)]
    return percentile_interval(statistic(np.arange(prompts)), draws)


def percentile_interval(value: float, draws: Sequence[float]) -> Interval:
    """``value`` with the central part of the draws that are defined; nan where hardly any is."""
    defined = np.asarray([draw for draw in draws if math.isfinite(draw)])
    if len(defined) < len(draws) / 2:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
