"""How well each sampler's expected DPO gradient points where J grows, from gradients of single responses.

Everything is linear in ∇log π(y): ∇J and each sampler's ∇L are weighted sums over responses,
and only the weights differ. ∇J = Cov_π(r* − r_θ, ∇log π), and with D, D* the differences of r_θ and r*,
∇L = −β·E[(σ(D*) − σ(D))·(∇log π(a) − ∇log π(b))]. Numpy only. Formulas: docs/algorithms.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pilaf_ray.evaluation.statistics import Interval, percentile_interval
from pilaf_ray.sampling.tabular import sigmoid

Array = NDArray[np.float64]
OBJECTIVE = "objective"


@dataclass(frozen=True, kw_only=True)
class ResponseSet:
    """Responses to one prompt that were drawn with one mixing coefficient."""

    true_rewards: Array
    """r*, shape (responses,)."""
    implicit_rewards: Array
    """r_θ = β·(log π − log π_ref)."""
    log_z: Array
    """log of the samples of Z that the draws gave, 0 for responses that are not mixed."""
    probabilities: Array | None = None
    """Exact probabilities, where the set holds every response there is; None where it is a sample."""

    def part(self, chosen: slice) -> "ResponseSet":
        """Some of a sample."""
        assert self.probabilities is None, "an exact set has no parts"
        return ResponseSet(
            true_rewards=self.true_rewards[chosen],
            implicit_rewards=self.implicit_rewards[chosen],
            log_z=self.log_z[chosen],
        )

    @property
    def size(self) -> int:
        """Number of responses."""
        return len(self.true_rewards)


@dataclass(frozen=True, kw_only=True)
class GradientBranch:
    """Pairs of one kind in a sampler's mixture."""

    weight: float
    coefficient_a: float
    coefficient_b: float
    is_z_weighted: bool = False
    """Whether a pair counts with its sample of Z⁺Z⁻: T-PILAF with its loss weight."""


def sampler_branches(name: str, *, beta: float) -> tuple[GradientBranch, ...]:
    """The mixture behind a preset, weights adding up to 1 before those by Z; KeyError for a name that has none."""
    plain = GradientBranch(weight=1.0, coefficient_a=0.0, coefficient_b=0.0)
    half = GradientBranch(weight=0.5, coefficient_a=0.0, coefficient_b=0.0)
    return {
        "vanilla": (plain,),
        "hybrid": (GradientBranch(weight=1.0, coefficient_a=0.0, coefficient_b=-1.0),),
        "pilaf": (half, GradientBranch(weight=0.5, coefficient_a=beta, coefficient_b=-beta)),
        "t_pilaf": (half, GradientBranch(weight=0.5, coefficient_a=beta, coefficient_b=-beta, is_z_weighted=True)),
    }[name]


def objective_weights(policy: ResponseSet) -> Array:
    """Weight of each ∇log π(y), y ∼ π, in ∇J: unbiased for a sample, exact for an exact set."""
    gap = policy.true_rewards - policy.implicit_rewards
    if policy.probabilities is not None:
        return np.asarray(policy.probabilities * (gap - policy.probabilities @ gap), dtype=np.float64)
    return np.asarray((gap - float(gap.mean())) / (policy.size - 1), dtype=np.float64)


def loss_weights(
    branches: Sequence[GradientBranch], sets: Mapping[float, ResponseSet], *, beta: float
) -> dict[float, Array]:
    """Weight of each ∇log π(y) in the sampler's ∇L, for the responses of each coefficient.

    The mean over every pair of an a and a b; of a sample against itself, over every pair of two different ones.
    """
    weights = {coefficient: np.zeros(found.size) for coefficient, found in sets.items()}
    for branch in branches:
        a, b = sets[branch.coefficient_a], sets[branch.coefficient_b]
        pull = sigmoid(_differences(a.true_rewards, b.true_rewards)) - sigmoid(
            _differences(a.implicit_rewards, b.implicit_rewards)
        )
        if branch.is_z_weighted:
            pull = pull * np.exp(a.log_z[:, None] + b.log_z[None, :])
        pull = branch.weight * beta * pull * _chances(a, b, same=branch.coefficient_a == branch.coefficient_b)
        weights[branch.coefficient_a] = weights[branch.coefficient_a] - pull.sum(axis=1)
        weights[branch.coefficient_b] = weights[branch.coefficient_b] + pull.sum(axis=0)
    return weights


def _chances(a: ResponseSet, b: ResponseSet, *, same: bool) -> Array:
    if a.probabilities is not None and b.probabilities is not None:
        return np.asarray(np.outer(a.probabilities, b.probabilities), dtype=np.float64)
    # A response against itself pulls nothing: the diagonal is zero without our help.
    count = a.size * (a.size - 1) if same else a.size * b.size
    return np.full((a.size, b.size), 1.0 / count)


def _differences(a: Array, b: Array) -> Array:
    return np.asarray(a[:, None] - b[None, :])


@dataclass(frozen=True, kw_only=True)
class PromptResponses:
    """One prompt's responses by coefficient, and ∇log π of each, shape (responses, parameters or projections)."""

    sets: Mapping[float, ResponseSet]
    gradients: Mapping[float, Array]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Estimates for one sampler from so many responses a prompt and coefficient."""

    sampler: str
    samples: int
    cosine: Interval
    """Of −∇L and ∇J, the noise of sampling taken out of the inner products; nan where it leaves no norm."""
    residual: Interval
    """‖∇L + κ·∇J‖/‖∇L‖ at the best κ, √(1 − cosine²); 0 where noise puts the cosine above 1."""
    plain_cosine: Interval
    """The cosine of the two estimates as they are, noise and all; too near to 0."""


def align(
    prompts: Sequence[PromptResponses], *, samplers: Sequence[str], beta: float, samples: int, resamples: int = 1000
) -> list[Alignment]:
    """One result a sampler from the first ``samples`` responses of each set; intervals resample prompts.

    Each set is cut in two halves. Products of estimates from different halves have independent noise, so their
    means are the true inner products: ‖∇J‖² as well as ⟨∇L, ∇J⟩.
    """
    half = samples // 2
    slices = (slice(0, half), slice(half, 2 * half))
    names = [OBJECTIVE, *samplers]
    # (half, target, prompt, projections)
    vectors = np.array([[[_vector(p, name, cut, beta) for p in prompts] for name in names] for cut in slices])
    # Inner products between prompts, so that a bootstrap sums numbers and not vectors.
    products = np.einsum("hipk,gjqk->hgijpq", vectors, vectors, optimize=True)
    rng = np.random.default_rng(0)
    chances = np.full(len(prompts), 1 / len(prompts))
    draws = [rng.multinomial(len(prompts), chances).astype(np.float64) for _ in range(resamples)]
    everything = np.ones(len(prompts))
    found = []
    for place, sampler in enumerate(samplers, start=1):
        estimates = [_cosines(products, place, counts) for counts in (everything, *draws)]
        corrected, plain = zip(*estimates, strict=True)
        residuals = [math.sqrt(max(0.0, 1 - cosine**2)) if math.isfinite(cosine) else math.nan for cosine in corrected]
        found.append(
            Alignment(
                sampler=sampler,
                samples=2 * half,
                cosine=percentile_interval(corrected[0], corrected[1:]),
                residual=percentile_interval(residuals[0], residuals[1:]),
                plain_cosine=percentile_interval(plain[0], plain[1:]),
            )
        )
    return found


def _vector(prompt: PromptResponses, name: str, cut: slice, beta: float) -> Array:
    sets = {coefficient: found.part(cut) for coefficient, found in prompt.sets.items()}
    if name == OBJECTIVE:
        return np.asarray(objective_weights(sets[0.0]) @ prompt.gradients[0.0][cut])
    weights = loss_weights(sampler_branches(name, beta=beta), sets, beta=beta)
    return np.asarray(sum(weights[c] @ prompt.gradients[c][cut] for c in sets))


def _cosines(products: Array, place: int, counts: Array) -> tuple[float, float]:
    """(corrected, plain) cosine of −∇L and ∇J summed over prompts with these counts."""
    sums = np.einsum("hgijpq,p,q->hgij", products[:, :, [[0], [place]], [[0, place]]], counts, counts)
    across = (sums[0, 1] + sums[1, 0]) / 2
    whole = sums.sum(axis=(0, 1))
    return _cosine(across), _cosine(whole)


def _cosine(products: Array) -> float:
    square = products[0, 0] * products[1, 1]
    if products[0, 0] <= 0 or products[1, 1] <= 0:
        return math.nan
    return float(-(products[0, 1] + products[1, 0]) / 2 / math.sqrt(square))
