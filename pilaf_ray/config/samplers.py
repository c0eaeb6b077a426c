"""Settings of the pair samplers."""

from typing import Annotated, Literal

from pydantic import Field

from pilaf_ray.config.base import Section
from pilaf_ray.config.oracle import FunctionOracleConfig, OracleConfig, RewardModelOracleConfig


class VanillaSamplerConfig(Section):
    """Both responses from π."""

    type: Literal["vanilla"] = "vanilla"
    """Discriminator."""


class PilafSamplerConfig(Section):
    """A fair coin between (π, π) and (π⁺, π⁻)."""

    type: Literal["pilaf"] = "pilaf"
    """Discriminator."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Mixing coefficient; algorithm.beta when left out, as the theory asks."""


class HybridSamplerConfig(Section):
    """One response from π, one from the reference."""

    type: Literal["hybrid"] = "hybrid"
    """Discriminator."""


class MixBranchConfig(Section):
    """One branch of a free mixture."""

    weight: float = Field(gt=0)
    """Relative probability."""
    coefficient_a: float
    """Mixing coefficient of side a."""
    coefficient_b: float
    """Mixing coefficient of side b."""


class MixSamplerConfig(Section):
    """Any distribution over coefficient pairs."""

    type: Literal["mix"] = "mix"
    """Discriminator."""
    branches: list[MixBranchConfig] = Field(min_length=1)
    """The branches."""


class TPilafSamplerConfig(Section):
    """PILAF's branches with odds Z⁺Z⁻ : 1, and a loss weight of 1 + Z⁺Z⁻, Z estimated from the pair's own draws."""

    type: Literal["t_pilaf"] = "t_pilaf"
    """Discriminator."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Mixing coefficient; algorithm.beta when left out, as the theory asks."""
    coin: Literal["weighted", "fair"] = "weighted"
    """weighted draws the branch by Z⁺Z⁻, for 5 forwards a pair; fair leaves Z⁺Z⁻ to the loss weight, for 3."""
    max_weight: float | None = Field(default=None, gt=0)
    """Cap of the loss weight; none when left out. A cap bounds the variance, and is biased where it binds."""


class BestOfNSamplerConfig(Section):
    """The best of n responses from π against the worst."""

    type: Literal["best_of_n"] = "best_of_n"
    """Discriminator."""
    n: int = Field(default=8, ge=2)
    """Candidates."""
    scorer: Literal["implicit_reward", "reward_model", "oracle"] = "implicit_reward"
    """Who ranks them: β·log(π/π_ref), the reward model that is being trained, or the oracle (n labelled responses)."""


class PilafRewardSamplerConfig(Section):
    """Of M responses from π one drawn ∝ exp(+reward) and one ∝ exp(−reward)."""

    type: Literal["pilaf_reward"] = "pilaf_reward"
    """Discriminator."""
    candidates: int = Field(default=8, ge=2)
    """M: more come closer to π⁺ and π⁻."""
    scorer: Literal["reward_model", "implicit_reward"] = "reward_model"
    """The reward: of the reward model that is being trained, or β·log(π/π_ref)."""
    distinct: bool = True
    """Never label a response against itself; false draws the two independently, as the theory has it."""


SamplerConfig = Annotated[
    VanillaSamplerConfig
    | PilafSamplerConfig
    | HybridSamplerConfig
    | MixSamplerConfig
    | TPilafSamplerConfig
    | BestOfNSamplerConfig
    | PilafRewardSamplerConfig,
    Field(discriminator="type"),
]


def labels_per_pair(sampler: SamplerConfig) -> float:
    """Labels that a pair costs: one, or n/2 where the oracle ranks n candidates."""
    if isinstance(sampler, BestOfNSamplerConfig) and sampler.scorer == "oracle":
        return sampler.n / 2
    return 1.0


def check_sampler(sampler: SamplerConfig, *, loss_beta: float, oracle: OracleConfig, exact_sampling: bool) -> None:
    """Refuse what contradicts other sections.

    Args:
        exact_sampling: temperature and top-p are 1.

    Raises:
        ValueError: names both keys and how to mend it.
    """
    kind = sampler.type
    if isinstance(sampler, PilafSamplerConfig | TPilafSamplerConfig) and sampler.beta is None and loss_beta >= 1:
        raise ValueError(
            f"sampler.type: {kind} mixes with algorithm.beta = {loss_beta:g}, which must be below 1: "
            "lower it, or set sampler.beta"
        )
    scorer = getattr(sampler, "scorer", None)
    if (kind == "t_pilaf" or scorer == "implicit_reward") and not exact_sampling:
        what = "scorer: implicit_reward" if scorer else "type: t_pilaf"
        raise ValueError(
            f"sampler.{what} reads π's log-probabilities from sampling, which are π's own at "
            "generation.temperature = 1 and generation.top_p = 1 only: set both to 1"
        )
    if scorer == "oracle" and not _scores_texts(oracle):
        raise ValueError(
            f"sampler.scorer: oracle needs rewards of single responses, and this oracle.type: {oracle.type} "
            "gives none: take a scoring function or a reward model as oracle, or another sampler.scorer"
        )


def _scores_texts(oracle: OracleConfig) -> bool:
    if isinstance(oracle, FunctionOracleConfig):
        return oracle.kind == "score"
    return isinstance(oracle, RewardModelOracleConfig)
