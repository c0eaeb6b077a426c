"""From ``sampler`` in the configuration to the objects that plan and draw pairs."""

import math
from functools import partial

from pilaf_ray.config.samplers import (
    BestOfNSamplerConfig,
    HybridSamplerConfig,
    MixSamplerConfig,
    PilafRewardSamplerConfig,
    PilafSamplerConfig,
    TPilafSamplerConfig,
)
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ConfigError
from pilaf_ray.pipeline.candidate_scoring import (
    CandidateScorer,
    ImplicitRewardScorer,
    OracleScorer,
    RewardModelScorer,
)
from pilaf_ray.pipeline.pair_sampling import CandidatePairs, PairSource, SidePairs, ZWeightedPairs
from pilaf_ray.pipeline.ports import GeneratorPort, RewardScorer, SequenceScorer, TextScorer
from pilaf_ray.sampling.candidates import choose_best_against_worst, resample_by_reward
from pilaf_ray.sampling.plans import (
    BestOfNSampler,
    HybridSampler,
    MixSampler,
    MixtureBranch,
    PairSampler,
    PilafRewardSampler,
    PilafSampler,
    TPilafSampler,
    VanillaSampler,
)


def build_sampler(config: RunConfig) -> PairSampler:
    """The pair sampler that ``sampler.type`` names."""
    settings = config.sampler
    match settings:
        case PilafSamplerConfig():
            return PilafSampler(beta=settings.beta or config.algorithm.beta)
        case TPilafSamplerConfig():
            return TPilafSampler(beta=settings.beta or config.algorithm.beta, weighted_coin=settings.coin == "weighted")
        case BestOfNSamplerConfig():
            return BestOfNSampler(n=settings.n, scorer=settings.scorer)
        case PilafRewardSamplerConfig():
            return PilafRewardSampler(candidates=settings.candidates, scorer=settings.scorer)
        case MixSamplerConfig():
            branches = [
                MixtureBranch(
                    name=f"mix-{number}",
                    weight=branch.weight,
                    coefficient_a=branch.coefficient_a,
                    coefficient_b=branch.coefficient_b,
                )
                for number, branch in enumerate(settings.branches)
            ]
            return MixSampler(branches=branches)
        case HybridSamplerConfig():
            return HybridSampler()
        case _:
            return VanillaSampler()


def build_pair_source(
    config: RunConfig,
    *,
    generator: GeneratorPort,
    reference: SequenceScorer,
    oracle: TextScorer,
    reward: RewardScorer | None = None,
) -> PairSource:
    """What draws the pairs of :func:`build_sampler`'s plans.

    Raises:
        ConfigError: candidates are to be scored by a reward model, and the run has none.
    """
    settings = config.sampler
    if isinstance(settings, TPilafSamplerConfig):
        return ZWeightedPairs(generator, max_weight=settings.max_weight or math.inf)
    if not isinstance(settings, BestOfNSamplerConfig | PilafRewardSamplerConfig):
        exact = config.generation.temperature == 1 and config.generation.top_p == 1
        return SidePairs(generator, knows_z=exact)
    scorer: CandidateScorer
    if settings.scorer == "implicit_reward":
        scorer = ImplicitRewardScorer(reference, beta=config.algorithm.beta)
    elif settings.scorer == "oracle":
        scorer = OracleScorer(oracle)
    elif reward is None:
        raise ConfigError(
            "sampler.scorer: reward_model needs a reward model that is trained in the run: configure one, "
            "or set sampler.scorer: implicit_reward"
        )
    else:
        scorer = RewardModelScorer(reward)
    if isinstance(settings, BestOfNSamplerConfig):
        return CandidatePairs(generator, scorer=scorer, choose=choose_best_against_worst)
    return CandidatePairs(generator, scorer=scorer, choose=partial(resample_by_reward, distinct=settings.distinct))
