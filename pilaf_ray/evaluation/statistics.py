"""Means and their standard errors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A sample mean and its standard error (NaN when there is only one value)."""

    mean: float
    standard_error: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent ``values`` and s/√n with s² = Σ(x − x̄)²/(n − 1).

    Raises:
        ValueError: no values.
    """
    if len(values) == 0:
        raise ValueError("no values to average")
    array = np.asarray(values, dtype=np.float64)
    if array.size == 1:
        return Estimate(mean=float(array[0]), standard_error=float("nan"))
    error = float(array.std(ddof=1) / np.sqrt(array.size))
    return Estimate(mean=float(array.mean()), standard_error=error)


def paired_gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Mean of ``after − before`` item by item, with the standard error of that difference.

    Pairing removes what differs between items, so it is far tighter than the
    difference of two means where items vary more than the change does.

    Raises:
        ValueError: different lengths, or no values.
    """
    return estimate([y - x for x, y in zip(before, after, strict=True)])
