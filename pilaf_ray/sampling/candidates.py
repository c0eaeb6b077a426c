"""Choosing a pair from a pool of scored candidates drawn from π. Plain Python.

Every choice derives from the pair's identity, as all randomness of a pair does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pilaf_ray.sampling.identity import derive_uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidatePair:
    """Positions of the two chosen candidates in their pool."""

    index_a: int
    index_b: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ResampledPair(CandidatePair):
    """A pair drawn by exp(±reward), and what the pool says of Z."""

    log_z_plus: float
    """log of the mean of exp(reward) over the pool."""
    log_z_minus: float


def best_against_worst(scores: Sequence[float]) -> CandidatePair:
    """Side a has the highest score, side b the lowest (best-of-N).

    Equal scores: the earliest is the best, the latest the worst, so the two differ always.

    Raises:
        ValueError: fewer than two scores, or one that is not finite.
    """
    _check(scores)
    indices = range(len(scores))
    best = max(indices, key=lambda i: (scores[i], -i))
    worst = min(indices, key=lambda i: (scores[i], -i))
    return CandidatePair(index_a=best, index_b=worst)


def choose_best_against_worst(pair_id: str, scores: Sequence[float]) -> CandidatePair:
    """:func:`best_against_worst`, which needs no draw, in the form that pair sources call."""
    return best_against_worst(scores)


def resample_by_reward(pair_id: str, rewards: Sequence[float], *, distinct: bool = False) -> ResampledPair:
    """Side a is drawn ∝ exp(+reward), side b ∝ exp(−reward): sampling by importance from π^±.

    ``rewards`` stay on the Bradley–Terry log-odds scale: a normalised reward is another
    sampler. With M candidates the draw is from π^± up to a bias of order 1/M. Both draws
    may hit the same candidate, a pair without a lesson; ``distinct`` draws side b from the
    others and so leaves the product distribution. The mean of exp(±reward) is unbiased for
    Z^±, its log is too low, and the two share their candidates.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite.
    """
    _check(rewards)
    count = len(rewards)
    index_a = _draw(list(rewards), derive_uniform(pair_id, "resample_plus"))
    rest = [i for i in range(count) if not (distinct and i == index_a)]
    index_b = rest[_draw([-rewards[i] for i in rest], derive_uniform(pair_id, "resample_minus"))]
    return ResampledPair(
        index_a=index_a,
        index_b=index_b,
        log_z_plus=_log_sum_exp(rewards) - math.log(count),
        log_z_minus=_log_sum_exp([-reward for reward in rewards]) - math.log(count),
    )


def _check(scores: Sequence[float]) -> None:
    if len(scores) < 2:
        raise ValueError(f"a pair needs two candidates or more, not {len(scores)}")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError("a candidate's score is not finite")


def _log_sum_exp(values: Sequence[float]) -> float:
    high = max(values)
    return high + math.log(sum(math.exp(value - high) for value in values))


def _draw(log_weights: Sequence[float], uniform: float) -> int:
    """Index ∝ exp(log weight), by inversion."""
    high = max(log_weights)
    weights = [math.exp(value - high) for value in log_weights]
    threshold = uniform * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    # Rounding alone leads here; the heaviest cannot be wrong by much.
    return weights.index(max(weights))
