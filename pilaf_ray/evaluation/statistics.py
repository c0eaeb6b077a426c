"""Means and their standard errors."""

import math
from collections.abc import Sequence


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
