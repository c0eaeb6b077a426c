"""Observations, how they combine, and what a key means."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mean:
    """Weighted mean of the values of one key; ``weight`` is the number of items behind the value."""

    value: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Max:
    """Largest value of one key."""

    value: float


@dataclass(frozen=True, slots=True)
class Sum:
    """Total of the values of one key."""

    value: float


@dataclass(frozen=True, slots=True)
class Last:
    """The newest value of one key."""

    value: float


Reduction = Mean | Max | Sum | Last


@dataclass(frozen=True, slots=True)
class Metric:
    """One observation of ``key``; how it combines with others is part of the value.

    Example: ``Metric("reward/policy", Mean(0.4, weight=16))``
    """

    key: str
    value: Reduction


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """What a key means."""

    key: str
    reduction: type[Reduction]
    unit: str
    formula: str
    healthy: str
