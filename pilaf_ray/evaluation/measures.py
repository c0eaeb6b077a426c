"""What an evaluation says of a policy: estimates with intervals over prompts. Pure functions."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.evaluation.statistics import Interval, bootstrap_mean, bootstrap_prompts, mean

Deltas = list[tuple[float, float]]
"""(r_θ(a) − r_θ(b), r*(a) − r*(b)) of pairs of responses."""
BINS = 10
"""Bins of equal width of the calibration error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImplicitReward:
    """How well r_θ = β·(log π_θ − log π_ref) predicts the gold preference between two responses of the policy."""

    accuracy: Interval
    """Share of pairs that r_θ orders as the gold reward does; pairs with equal gold rewards are left out."""
    calibration_error: Interval
    """Mean distance of σ(r_θ(a) − r_θ(b)) from the gold σ(r*(a) − r*(b)), bin by bin (ECE)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyMeasures:
    """Estimates of one policy; rewards are log-odds, KL is in nats, lengths are tokens."""

    reward: Interval
    kl: Interval
    kl_low_variance: Interval
    """KL with its control variate; see :func:`adjusted_kls`."""
    objective: Interval
    length: Interval
    distinct_1: Interval
    """Share of different words in a response."""
    distinct_2: Interval
    """Share of different word pairs in a response."""
    corpus_distinct_2: float
    """The same over all responses together: low where the answers are alike. No interval: resampling repeats texts."""
    implicit_reward: ImplicitReward | None
    """None where there is one response a prompt, or no two with unequal gold rewards."""


def measure(result: EvaluationResult, *, beta: float, seed: int = 0) -> PolicyMeasures:
    """All estimates of one evaluation; the intervals resample prompts, not responses."""

    def interval(values: Sequence[float]) -> Interval:
        return bootstrap_mean(by_prompt(values, result.samples), seed=seed)

    objectives = [reward - beta * kl for reward, kl in zip(result.rewards, result.kls, strict=True)]
    return PolicyMeasures(
        reward=interval(result.rewards),
        kl=interval(result.kls),
        kl_low_variance=interval(adjusted_kls(result)),
        objective=interval(objectives),
        length=interval(result.lengths),
        distinct_1=interval([distinct([text], 1) for text in result.responses]),
        distinct_2=interval([distinct([text], 2) for text in result.responses]),
        corpus_distinct_2=distinct(result.responses, 2),
        implicit_reward=_implicit_reward(result, beta=beta, seed=seed),
    )


def adjusted_kls(result: EvaluationResult) -> list[float]:
    """KL estimates less what their control variate explains: the same mean, up to O(1/n), and less variance.

    kl + λ·control with the λ of least variance, −Cov(kl, control)/Var(control), estimated from these responses.
    """
    kls, controls = np.asarray(result.kls), np.asarray(result.kl_controls)
    variance = float(np.var(controls))
    factor = -float(np.mean((kls - kls.mean()) * (controls - controls.mean()))) / variance if variance else 0.0
    return [float(value) for value in kls + factor * controls]


def by_prompt(values: Sequence[float], samples: int) -> list[float]:
    """Means over the ``samples`` responses of each prompt."""
    return [mean(values[start : start + samples]) for start in range(0, len(values), samples)]


def distinct(texts: Sequence[str], length: int) -> float:
    """Different runs of ``length`` words over all runs of that length; 1 where there is none."""
    runs = [
        tuple(words[start : start + length])
        for words in (text.split() for text in texts)
        for start in range(len(words) - length + 1)
    ]
    return len(set(runs)) / len(runs) if runs else 1.0


def win_rate(preferences: Sequence[float | None], samples: int, *, seed: int = 0) -> Interval | None:
    """Mean of P(ours preferred) over the judged pairs, ½ for a tie; None where the judge always abstained."""
    groups = [preferences[start : start + samples] for start in range(0, len(preferences), samples)]
    judged = [[p for p in group if p is not None] for group in groups]
    means = [mean(group) for group in judged if group]
    return bootstrap_mean(means, seed=seed) if means else None


def both_orders(first: float | None, second: float | None) -> float | None:
    """One verdict from P(ours) with ours shown first and with ours shown second; None if either abstained."""
    return None if first is None or second is None else (first + second) / 2


def calibration_error(predicted: Sequence[float], observed: Sequence[float]) -> float:
    """Σ over bins of share · |mean predicted − mean observed|, predictions in [0, 1]."""
    bins = np.minimum((np.asarray(predicted) * BINS).astype(int), BINS - 1)
    gaps = np.asarray(predicted) - np.asarray(observed)
    return float(np.abs(np.bincount(bins, weights=gaps, minlength=BINS)).sum() / len(gaps))


def _implicit_reward(result: EvaluationResult, *, beta: float, seed: int) -> ImplicitReward | None:
    pairs = [
        [(beta * (result.kls[i] - result.kls[j]), result.rewards[i] - result.rewards[j]) for i, j in couples]
        for couples in _couples(len(result.rewards), result.samples)
    ]
    unequal = [[(r, gold) for r, gold in prompt if gold != 0.0] for prompt in pairs]
    known = [prompt for prompt in unequal if prompt]
    if len(known) < 2:
        return None

    def over(statistic: Callable[[Deltas], float], groups: list[Deltas]) -> Interval:
        return bootstrap_prompts(
            lambda rows: statistic([pair for row in rows for pair in groups[row]]), prompts=len(groups), seed=seed
        )

    return ImplicitReward(accuracy=over(_accuracy, known), calibration_error=over(_calibration, pairs))


def _couples(responses: int, samples: int) -> list[list[tuple[int, int]]]:
    """Every two responses of the same prompt, prompt by prompt."""
    starts = range(0, responses, samples)
    return [list(itertools.combinations(range(start, start + samples), 2)) for start in starts]


def _accuracy(pairs: Sequence[tuple[float, float]]) -> float:
    return mean([0.5 if r == 0.0 else float((r > 0.0) == (gold > 0.0)) for r, gold in pairs])


def _calibration(pairs: Sequence[tuple[float, float]]) -> float:
    # Both orders of each pair, so that the error does not depend on which response came first.
    sides = [(sign * r, sign * gold) for r, gold in pairs for sign in (1.0, -1.0)]
    return calibration_error([_sigmoid(r) for r, _ in sides], [_sigmoid(gold) for _, gold in sides])


def _sigmoid(value: float) -> float:
    return 0.5 * (1.0 + math.tanh(value / 2.0))
