"""Samplers beside each other at one budget: what their runs say, with intervals over seeds. Pure functions.

A run is a sampler and a seed; runs with the same seed see the same prompts in the same order, the same
label draws and the same evaluation draws, so samplers are compared seed by seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pilaf_ray.evaluation.run_records import RunRecord
from pilaf_ray.evaluation.statistics import LEVEL, Interval

Array = NDArray[np.float64]
AXES = ("labels", "generated_tokens", "seconds")
"""What a budget may be counted in."""
_SAVING_STEPS = 1000
"""Savings that are tried on either side of none: limits are that fine."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The evaluations of one run, in order; arrays of prompts have shape (evaluations, responses)."""

    sampler: str
    seed: int
    beta: float
    labels: Array
    generated_tokens: Array
    seconds: Array
    rewards: Array
    kls: Array
    forwards: float
    """Sequence forwards of the whole run."""
    scoring_forwards: float
    is_partial: bool

    @cached_property
    def objectives(self) -> Array:
        """J = R − β·KL of each response."""
        return np.asarray(self.rewards - self.beta * self.kls)

    def means(self, name: str) -> Array:
        """Mean over responses of ``rewards``, ``kls`` or ``objectives`` at each evaluation."""
        values: Array = getattr(self, name)
        return np.asarray(values.mean(axis=1))


def read_curve(record: RunRecord, *, sampler: str, seed: int) -> Curve:
    """What a run's folder says, at its evaluations."""
    steps = [result.step for result in record.evaluations]
    return Curve(
        sampler=sampler,
        seed=seed,
        beta=record.beta,
        labels=np.array([record.labels[step] for step in steps]),
        generated_tokens=np.array([record.generated_tokens[step] for step in steps]),
        seconds=np.array([record.seconds[step] for step in steps]),
        rewards=np.array([result.rewards for result in record.evaluations]),
        kls=np.array([result.kls for result in record.evaluations]),
        forwards=float(sum(line["cost/sequence_forwards"] for line in record.metrics)),
        scoring_forwards=float(sum(line["cost/scoring_forwards"] for line in record.metrics)),
        is_partial=record.is_partial,
    )


@dataclass(frozen=True, kw_only=True)
class SamplerResult:
    """One sampler at the end of its budget: means over seeds with Student's intervals, costs as means."""

    sampler: str
    seeds: tuple[int, ...]
    reward: Interval
    kl: Interval
    objective: Interval
    gain: Interval
    """Final J less J at the start."""
    advantage: Interval | None
    """J less the baseline's J at the same seed; None for the baseline."""
    label_saving: Interval | None
    """Share of the baseline's labels that are not needed for its final J; None for the baseline."""
    labels: float
    generated_tokens: float
    forwards: float
    scoring_forwards: float
    seconds: float


def compare(curves: Sequence[Curve], *, baseline: str) -> list[SamplerResult]:
    """One result a sampler, in order of first appearance."""
    samplers = list(dict.fromkeys(curve.sampler for curve in curves))
    base = {curve.seed: curve for curve in curves if curve.sampler == baseline}
    results = []
    for sampler in samplers:
        own = [curve for curve in curves if curve.sampler == sampler]
        paired = [(curve, base[curve.seed]) for curve in own if curve.seed in base]
        against = paired if sampler != baseline else []
        results.append(
            SamplerResult(
                sampler=sampler,
                seeds=tuple(curve.seed for curve in own),
                reward=over_seeds([curve.means("rewards")[-1] for curve in own]),
                kl=over_seeds([curve.means("kls")[-1] for curve in own]),
                objective=over_seeds([_final(curve) for curve in own]),
                gain=over_seeds([_final(curve) - curve.means("objectives")[0] for curve in own]),
                advantage=over_seeds([_final(a) - _final(b) for a, b in against]) if against else None,
                label_saving=label_saving(against) if against else None,
                labels=_mean([curve.labels[-1] for curve in own]),
                generated_tokens=_mean([curve.generated_tokens[-1] for curve in own]),
                forwards=_mean([curve.forwards for curve in own]),
                scoring_forwards=_mean([curve.scoring_forwards for curve in own]),
                seconds=_mean([curve.seconds[-1] for curve in own]),
            )
        )
    return results


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean with Student's interval; one seed says nothing of others, so its limits are undefined."""
    centre = _mean(values)
    if len(values) < 2:
        return Interval(centre, math.nan, math.nan)
    half = float(_student_half_width(np.asarray(values)))
    return Interval(centre, centre - half, centre + half)


def _student_half_width(values: Array) -> Array:
    """Half of Student's interval for the mean over seeds, the first axis of ``values``."""
    from scipy.stats import t

    seeds = len(values)
    return np.asarray(t.ppf((1 + LEVEL) / 2, seeds - 1) * values.std(axis=0, ddof=1) / math.sqrt(seeds))


def label_saving(pairs: Sequence[tuple[Curve, Curve]]) -> Interval:
    """1 − n/N: the sampler needs n labels for the J that the baseline has after all of its N.

    A sampler that never gets there has a negative saving, 1 − N/n, the baseline needing n labels for the
    sampler's final J; −∞ where the sampler ends below the common start; 1 where the baseline does. Curves are
    means over seeds, straight between evaluations.

    The interval holds the savings that the seeds do not contradict: each saving says where the two curves are level,
    and it is kept while Student's test over seeds finds the difference there to be zero (Fieller's method, which needs
    no large number of seeds as resampling them does: a bootstrap over 3 seeds covers 7 times of 10). It is the range
    of what is kept, so a flat curve gives a wide one. One seed has no limits.
    """
    value = _saving(pairs)
    if len(pairs) < 2:
        return Interval(value, math.nan, math.nan)
    savings, differences = _level_differences(pairs)
    # Where all seeds agree the difference is what it is: kept only if it is none.
    kept = savings[np.abs(differences.mean(axis=0)) <= _student_half_width(differences)]
    return Interval(value, min([value, *kept.tolist()]), max([value, *kept.tolist()]))


def _saving(pairs: Sequence[tuple[Curve, Curve]]) -> float:
    labels_a, ours = _mean_objective([ours for ours, _ in pairs])
    labels_b, theirs = _mean_objective([theirs for _, theirs in pairs])
    needed = first_crossing(labels_a, ours, theirs[-1])
    if needed is not None:
        return float(1 - needed / labels_b[-1])
    needed = first_crossing(labels_b, theirs, ours[-1])
    assert needed is not None, "the sampler ends below the baseline's end, so the baseline passes there"
    return float(1 - labels_a[-1] / needed) if needed > 0 else -math.inf


def _level_differences(pairs: Sequence[tuple[Curve, Curve]]) -> tuple[Array, Array]:
    """Savings, and the sampler's J less the baseline's where each saving has them level, shape (seeds, savings).

    From 1 downwards: the sampler's curve against the baseline's end, then its end against the baseline's curve.
    """
    end_a, end_b = (min(curve.labels[-1] for curve in column) for column in zip(*pairs, strict=True))
    shares = np.linspace(0.0, 1.0, _SAVING_STEPS + 1)
    needed_a, needed_b = shares * end_a, shares[::-1] * end_b
    rows = []
    for ours, theirs in pairs:
        by_sampler = _objective_at(ours, needed_a) - _objective_at(theirs, end_b)
        by_baseline = _objective_at(ours, end_a) - _objective_at(theirs, needed_b)
        rows.append(np.concatenate([by_sampler, by_baseline]))
    with np.errstate(divide="ignore"):
        savings = np.concatenate([1 - needed_a / end_b, 1 - end_a / needed_b])
    return savings, np.array(rows)


def _objective_at(curve: Curve, labels: Array | float) -> Array:
    """Mean J after so many labels, straight between evaluations."""
    return np.asarray(np.interp(labels, curve.labels, curve.means("objectives")))


def _mean_objective(curves: Sequence[Curve]) -> tuple[Array, Array]:
    """(labels, J), a mean over seeds at every number of labels at which one of them was evaluated."""
    last = min(curve.labels[-1] for curve in curves)
    grid = np.unique(np.concatenate([curve.labels for curve in curves]))
    grid = grid[grid <= last]
    return grid, np.asarray(np.mean([_objective_at(curve, grid) for curve in curves], axis=0))


def first_crossing(x: Array, y: Array, level: float) -> float | None:
    """The first x at which the line through (x, y) is at ``level`` or above; None if it never is."""
    if y[0] >= level:
        return float(x[0])
    for i in range(1, len(x)):
        if y[i] >= level:
            share = (level - y[i - 1]) / (y[i] - y[i - 1])
            return float(x[i - 1] + share * (x[i] - x[i - 1]))
    return None


@dataclass(frozen=True, kw_only=True)
class Band:
    """A mean curve over seeds and the range of the seeds."""

    sampler: str
    x: Array
    y: Array
    low: Array
    high: Array


def band(curves: Sequence[Curve], sampler: str, *, x: Callable[[Curve], Array], y: Callable[[Curve], Array]) -> Band:
    """The curves of ``sampler`` together, evaluation by evaluation, as far as all of its seeds have come."""
    own = [curve for curve in curves if curve.sampler == sampler]
    count = min(len(curve.labels) for curve in own)
    values = np.array([y(curve)[:count] for curve in own])
    return Band(
        sampler=sampler,
        x=np.mean([x(curve)[:count] for curve in own], axis=0),
        y=values.mean(axis=0),
        low=values.min(axis=0),
        high=values.max(axis=0),
    )


def _final(curve: Curve) -> float:
    return float(curve.means("objectives")[-1])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
