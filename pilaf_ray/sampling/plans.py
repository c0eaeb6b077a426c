"""Which pairs are sampled: one mixing coefficient a response.

A response with coefficient c is decoded from (1 + c)·h_policy − c·h_reference:
0 is the policy π, +β is π⁺, −β is π⁻ and −1 is the reference (Feng et al., PILAF,
Algorithm 1 and Table 1). A sampler is a small distribution over (c_a, c_b).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pilaf_ray.errors import ConfigError
from pilaf_ray.sampling.costs import CandidateScorer, candidate_cost, sides_cost
from pilaf_ray.sampling.identity import derive_seed, derive_uniform, pair_identity
from pilaf_ray.types import PairCost, PairPlan, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureBranch:
    """With probability ∝ ``weight``, side a gets ``coefficient_a`` and side b ``coefficient_b``."""

    name: str
    weight: float
    coefficient_a: float
    coefficient_b: float

    @property
    def cost(self) -> PairCost:
        """Cost of one pair."""
        return sides_cost(self.coefficient_a, self.coefficient_b)


class PairSampler:
    """Draws a pair's plan from its branches.

    Args:
        branches: what sides a and b are drawn from.
        candidates: seeds of further responses from π that a plan carries.

    Raises:
        ConfigError: no branch, or weights that are not positive.
    """

    def __init__(self, branches: Sequence[MixtureBranch], *, candidates: int = 0) -> None:
        if not branches or any(branch.weight <= 0 for branch in branches):
            raise ConfigError("sampler: give at least one branch, each with a weight above 0")
        self._branches = tuple(branches)
        self._candidates = candidates
        self._total = sum(branch.weight for branch in branches)

    @property
    def branches(self) -> tuple[MixtureBranch, ...]:
        """The distribution over coefficient pairs."""
        return self._branches

    @property
    def expected_cost(self) -> PairCost:
        """Expected cost of a pair, the paper's Table 1; tokens are not known beforehand."""
        first, *others = (branch.cost.scaled(branch.weight / self._total) for branch in self._branches)
        return sum(others, start=first)

    def plan(self, prompt: Prompt, *, run_seed: int, epoch: int, draw: int, index: int) -> PairPlan:
        """Draw everything that is random about pair number ``index``."""
        pair_id = pair_identity(run_seed, epoch, prompt.prompt_id, draw)
        branch = self._draw(derive_uniform(pair_id, "coin"))
        return PairPlan(
            pair_id=pair_id,
            index=index,
            prompt=prompt,
            branch=branch.name,
            coefficient_a=branch.coefficient_a,
            coefficient_b=branch.coefficient_b,
            seed_a=derive_seed(pair_id, "a"),
            seed_b=derive_seed(pair_id, "b"),
            present_b_first=derive_uniform(pair_id, "order") < 0.5,
            label_seed=derive_seed(pair_id, "label"),
            candidate_seeds=tuple(derive_seed(pair_id, f"candidate-{number}") for number in range(self._candidates)),
        )

    def _draw(self, uniform: float) -> MixtureBranch:
        threshold = uniform * self._total
        for branch in self._branches:
            threshold -= branch.weight
            if threshold < 0:
                return branch
        return self._branches[-1]


def _branch(name: str, a: float, b: float) -> MixtureBranch:
    return MixtureBranch(name=name, weight=1.0, coefficient_a=a, coefficient_b=b)


class VanillaSampler(PairSampler):
    """Both responses from π."""

    def __init__(self) -> None:
        super().__init__([_branch("on_policy", 0.0, 0.0)])


class PilafSampler(PairSampler):
    """A fair coin between (π, π) and (π⁺, π⁻); ``beta`` is the β of the loss."""

    def __init__(self, *, beta: float) -> None:
        super().__init__([_branch("on_policy", 0.0, 0.0), _branch("interpolated", beta, -beta)])


class HybridSampler(PairSampler):
    """One response from π, one from the reference."""

    def __init__(self) -> None:
        super().__init__([_branch("hybrid", 0.0, -1.0)])


class MixSampler(PairSampler):
    """Any distribution over coefficient pairs."""

    def __init__(self, *, branches: Sequence[MixtureBranch]) -> None:
        super().__init__(branches)


class TPilafSampler(PairSampler):
    """Both branches of PILAF, weighted by Z⁺Z⁻ (:class:`pilaf_ray.pipeline.pair_sampling.ZWeightedPairs`).

    Args:
        weighted_coin: the branch is drawn with odds Z⁺Z⁻ : 1 after both mixed responses are there, so a
            plan always has the mixed sides and carries two more seeds for (π, π). Otherwise the coin
            is fair, as in PILAF, and Z⁺Z⁻ is in the weight alone.
    """

    def __init__(self, *, beta: float, weighted_coin: bool) -> None:
        mixed = _branch("interpolated", beta, -beta)
        super().__init__(
            [mixed] if weighted_coin else [_branch("on_policy", 0.0, 0.0), mixed], candidates=2 if weighted_coin else 0
        )
        self._weighted_coin = weighted_coin

    @property
    def expected_cost(self) -> PairCost:
        """Where policy and reference are equal; the weighted coin then draws (π, π) every other time, too."""
        again = PairCost(sequence_forwards=1.0 if self._weighted_coin else 0.0, labelled_responses=0.0)
        return super().expected_cost + again


class _CandidateSampler(PairSampler):
    """Two of a pool of responses from π."""

    def __init__(self, *, branch: str, candidates: int, scorer: CandidateScorer) -> None:
        if candidates < 2:
            raise ConfigError(f"sampler: a pair needs two candidates or more, not {candidates}")
        super().__init__([_branch(branch, 0.0, 0.0)], candidates=candidates)
        self._scorer = scorer

    @property
    def expected_cost(self) -> PairCost:
        """Cost of every pair."""
        return candidate_cost(self._candidates, self._scorer)


class BestOfNSampler(_CandidateSampler):
    """The best of ``n`` responses from π against the worst."""

    def __init__(self, *, n: int, scorer: CandidateScorer) -> None:
        super().__init__(branch="best_of_n", candidates=n, scorer=scorer)


class PilafRewardSampler(_CandidateSampler):
    """Of ``candidates`` responses from π one drawn ∝ exp(+reward), one ∝ exp(−reward)."""

    def __init__(self, *, candidates: int, scorer: CandidateScorer) -> None:
        super().__init__(branch="resampled", candidates=candidates, scorer=scorer)


SAMPLER_CLASSES: dict[str, type[PairSampler]] = {
    "vanilla": VanillaSampler,
    "pilaf": PilafSampler,
    "hybrid": HybridSampler,
    "mix": MixSampler,
    "t_pilaf": TPilafSampler,
    "best_of_n": BestOfNSampler,
    "pilaf_reward": PilafRewardSampler,
}
