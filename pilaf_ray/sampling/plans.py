"""Which pairs are sampled: one mixing coefficient a response.

A response with coefficient c is decoded from (1 + c)·h_policy − c·h_reference:
0 is the policy π, +β is π⁺, −β is π⁻ and −1 is the reference (Feng et al., PILAF,
Algorithm 1 and Table 1). A sampler is a small distribution over (c_a, c_b).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pilaf_ray.errors import ConfigError
from pilaf_ray.sampling.identity import derive_seed, derive_uniform, pair_identity
from pilaf_ray.types import PairPlan, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureBranch:
    """With probability ∝ ``weight``, side a gets ``coefficient_a`` and side b ``coefficient_b``."""

    name: str
    weight: float
    coefficient_a: float
    coefficient_b: float

    @property
    def forwards(self) -> int:
        """Sequence forwards of one pair: a pure policy or reference response costs one network."""
        return sum(1 if c in (0.0, -1.0) else 2 for c in (self.coefficient_a, self.coefficient_b))


class PairSampler:
    """Draws a pair's plan from its branches.

    Raises:
        ConfigError: no branch, or weights that are not positive.
    """

    def __init__(self, branches: Sequence[MixtureBranch]) -> None:
        if not branches or any(branch.weight <= 0 for branch in branches):
            raise ConfigError("sampler: give at least one branch, each with a weight above 0")
        self._branches = tuple(branches)
        self._total = sum(branch.weight for branch in branches)

    @property
    def branches(self) -> tuple[MixtureBranch, ...]:
        """The distribution over coefficient pairs."""
        return self._branches

    @property
    def expected_forwards(self) -> float:
        """Expected sequence forwards a pair, the paper's sampling cost (Table 1)."""
        return sum(branch.weight * branch.forwards for branch in self._branches) / self._total

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


SAMPLER_CLASSES: dict[str, type[PairSampler]] = {
    "vanilla": VanillaSampler,
    "pilaf": PilafSampler,
    "hybrid": HybridSampler,
    "mix": MixSampler,
}
