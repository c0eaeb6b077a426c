"""Pair plans: presets, identity, coin, costs."""

import pickle
from typing import get_args

import pytest

from pilaf_ray.config.samplers import SamplerConfig
from pilaf_ray.errors import ConfigError
from pilaf_ray.sampling.identity import derive_seed, derive_uniform, pair_identity
from pilaf_ray.sampling.plans import (
    SAMPLER_CLASSES,
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
from pilaf_ray.types import PairPlan, Prompt

PROMPT = Prompt(prompt_id="p", text="t", token_ids=(1, 2))


def plans(sampler: PairSampler, count: int) -> list[PairPlan]:
    return [sampler.plan(PROMPT, run_seed=0, epoch=0, draw=draw, index=draw) for draw in range(count)]


@pytest.mark.parametrize(
    ("sampler", "coefficients", "cost"),
    [
        (VanillaSampler(), {(0.0, 0.0)}, 2.0),
        (PilafSampler(beta=0.1), {(0.0, 0.0), (0.1, -0.1)}, 3.0),
        (HybridSampler(), {(0.0, -1.0)}, 2.0),
        (TPilafSampler(beta=0.1, weighted_coin=True), {(0.1, -0.1)}, 5.0),
        (TPilafSampler(beta=0.1, weighted_coin=False), {(0.0, 0.0), (0.1, -0.1)}, 3.0),
        (BestOfNSampler(n=8, scorer="implicit_reward"), {(0.0, 0.0)}, 8.0),
        (BestOfNSampler(n=8, scorer="oracle"), {(0.0, 0.0)}, 8.0),
        (PilafRewardSampler(candidates=4, scorer="reward_model"), {(0.0, 0.0)}, 4.0),
    ],
)
def test_presets_have_the_papers_coefficients_and_costs(
    sampler: PairSampler, coefficients: set[tuple[float, float]], cost: float
) -> None:
    assert {(p.coefficient_a, p.coefficient_b) for p in plans(sampler, 200)} == coefficients
    assert sampler.expected_cost.sequence_forwards == cost


def test_coin_is_fair_within_four_standard_errors() -> None:
    heads = sum(p.branch == "interpolated" for p in plans(PilafSampler(beta=0.1), 4000))
    assert abs(heads - 2000) < 4 * (4000 * 0.25) ** 0.5


def test_presentation_order_is_independent_of_the_branch() -> None:
    drawn = [p for p in plans(PilafSampler(beta=0.1), 8000) if p.branch == "interpolated"]
    first = sum(p.present_b_first for p in drawn)
    assert abs(first - len(drawn) / 2) < 4 * (len(drawn) * 0.25) ** 0.5


def test_mix_follows_its_weights() -> None:
    branches = [
        MixtureBranch(name="x", weight=3, coefficient_a=0.0, coefficient_b=0.0),
        MixtureBranch(name="y", weight=1, coefficient_a=0.5, coefficient_b=-0.5),
    ]
    count = sum(p.branch == "y" for p in plans(MixSampler(branches=branches), 4000))
    assert abs(count - 1000) < 4 * (4000 * 0.1875) ** 0.5


def test_same_identity_gives_the_same_plan_and_others_differ() -> None:
    sampler = PilafSampler(beta=0.1)
    assert plans(sampler, 3) == plans(sampler, 3)
    assert len({p.pair_id for p in plans(sampler, 100)}) == 100
    identity = pair_identity(0, 0, "p", 0)
    assert len({derive_seed(identity, purpose) for purpose in "abcdef"}) == 6
    assert 0 <= derive_uniform(identity, "coin") < 1
    assert 0 <= derive_seed(identity, "a") < 2**63


def test_weightless_branch_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight above 0"):
        MixSampler(branches=[MixtureBranch(name="x", weight=0, coefficient_a=0, coefficient_b=0)])


def test_candidates_have_seeds_of_their_own_and_survive_pickling() -> None:
    plan = BestOfNSampler(n=8, scorer="oracle").plan(PROMPT, run_seed=0, epoch=0, draw=0, index=0)
    assert len({*plan.candidate_seeds, plan.seed_a, plan.seed_b}) == 10
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_every_configurable_sampler_has_its_class() -> None:
    union = get_args(get_args(SamplerConfig)[0])
    assert set(SAMPLER_CLASSES) == {member.model_fields["type"].default for member in union}
    for name, member in ((m.model_fields["type"].default, m) for m in union):
        assert SAMPLER_CLASSES[name].__name__ + "Config" == member.__name__
