"""The reward–KL frontier as a figure: where each evaluation stands, in the order of training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pilaf_ray.console.records import Evaluation

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 14, 34


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An evaluation at its place in the picture."""

    x: float
    y: float
    low: float
    """Where the interval of two standard errors begins and, in ``high``, ends."""
    high: float
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """All that the template draws; coordinates in pixels of a WIDTH × HEIGHT picture."""

    width: int
    height: int
    marks: Sequence[Mark]
    path: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    best: Evaluation
    """The evaluation with the largest J."""


def frontier_figure(evaluations: Sequence[Evaluation], *, beta: float) -> Frontier | None:
    """The figure, None before the first evaluation; ``beta`` is the one of J = R − β·KL."""
    if not evaluations:
        return None
    x_low, x_high = _range([e.kl for e in evaluations])
    y_low, y_high = _range([e.reward + sign * 2 * e.reward_se for e in evaluations for sign in (-1, 1)])

    def x(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    marks = [
        Mark(x=x(e.kl), y=y(e.reward), low=y(e.reward - 2 * e.reward_se), high=y(e.reward + 2 * e.reward_se),
             evaluation=e)
        for e in evaluations
    ]  # fmt: skip
    return Frontier(
        width=WIDTH,
        height=HEIGHT,
        marks=marks,
        path=" ".join(f"{mark.x},{mark.y}" for mark in marks),
        x_ticks=[(x(value), f"{value:.3g}") for value in _ticks(x_low, x_high)],
        y_ticks=[(y(value), f"{value:.3g}") for value in _ticks(y_low, y_high)],
        best=max(evaluations, key=lambda e: e.reward - beta * e.kl),
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    size = power * min((1, 2, 5, 10), key=lambda factor: abs(factor - rough / power))
    return [round(size * n, 12) for n in range(math.ceil(low / size), math.floor(high / size) + 1)]
