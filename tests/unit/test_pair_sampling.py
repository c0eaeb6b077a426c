"""Every sampler's pairs against exact enumeration: the responses, the weights, the choice and the costs.

The two networks are tables over a vocabulary of three, responses have two tokens, and the fake
generator draws as the real one does: by inversion at numbers that seed and position fix.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import pytest

from pilaf_ray.pipeline.candidate_scoring import ImplicitRewardScorer, OracleScorer, RewardModelScorer
from pilaf_ray.pipeline.pair_sampling import CandidatePairs, PairSource, SidePairs, ZWeightedPairs
from pilaf_ray.sampling.candidates import choose_best_against_worst, resample_by_reward
from pilaf_ray.sampling.draw import token_uniform
from pilaf_ray.sampling.normalizers import log_z_sample, t_pilaf_branch_probability, t_pilaf_loss_weight
from pilaf_ray.sampling.plans import (
    BestOfNSampler,
    HybridSampler,
    PairSampler,
    PilafRewardSampler,
    PilafSampler,
    TPilafSampler,
    VanillaSampler,
)
from pilaf_ray.sampling.tabular import TabularPrompt, best_of_n_pairs
from pilaf_ray.types import (
    FinishReason,
    GenerationRequest,
    PairPlan,
    Prompt,
    ResponsePair,
    RewardScores,
    SampledResponse,
    ScoringItem,
    TokenPair,
    VersionSpan,
)

BETA, VOCAB, LENGTH = 0.5, 3, 2
RESPONSES = list(itertools.product(range(VOCAB), repeat=LENGTH))
Array = np.ndarray


def log_softmax(logits: Array) -> Array:
    return logits - np.logaddexp.reduce(logits)


_rng = np.random.default_rng(3)
TABLES = {
    prefix: (log_softmax(1.5 * _rng.normal(size=VOCAB)), log_softmax(_rng.normal(size=VOCAB)))
    for n in range(LENGTH)
    for prefix in itertools.product(range(VOCAB), repeat=n)
}


@cache
def row(prefix: tuple[int, ...], c: float) -> Array:
    policy, reference = TABLES[prefix]
    return log_softmax((1 + c) * policy - c * reference)


@cache
def respond(tokens: tuple[int, ...], c: float) -> SampledResponse:
    places = [(tokens[:t], token) for t, token in enumerate(tokens)]
    return SampledResponse(
        token_ids=tokens,
        text=str(RESPONSES.index(tokens)),
        coefficient=c,
        logprobs=tuple(float(row(prefix, c)[token]) for prefix, token in places),
        versions=(VersionSpan(version=0, start=0, end=LENGTH),),
        finish_reason=FinishReason.LENGTH,
        policy_logprobs=tuple(float(TABLES[prefix][0][token]) for prefix, token in places) if c else None,
        reference_logprobs=tuple(float(TABLES[prefix][1][token]) for prefix, token in places) if c else None,
    )


def distribution(c: float) -> Array:
    """Probability of each response."""
    return np.exp([sum(respond(y, c).logprobs) for y in RESPONSES])


@dataclass
class World:
    """A generator, a reference, an oracle and a reward model; counts what they are asked."""

    calls: Counter[str] = field(default_factory=Counter)
    scored_for: list[str] = field(default_factory=list)
    """Ids of the pairs whose candidates were scored."""

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        self.calls["generate"] += 1
        tokens: tuple[int, ...] = ()
        for position in range(LENGTH):
            cumulated = np.exp(row(tokens, request.coefficient)).cumsum()
            tokens += (int(np.searchsorted(cumulated, token_uniform(request.seed, position), side="right")),)
        return respond(tokens, request.coefficient)

    async def score_responses(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[float]:
        self.calls["reference"] += len(items)
        self.scored_for += pairs
        return [sum(respond(response, -1.0).logprobs) for _, response in items]

    async def score_texts(self, prompts: list[str], responses: list[str], *, pairs: Sequence[str] = ()) -> list[float]:
        self.calls["oracle"] += len(responses)
        self.scored_for += pairs
        return [float(text) for text in responses]

    async def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        self.calls["reward"] += len(items)
        return RewardScores(version=7, values=tuple(REWARDS[int(item.text)] for item in items))


REWARDS = [float(value) for value in np.random.default_rng(5).normal(size=len(RESPONSES))]
TABULAR = TabularPrompt(
    policy_logits=np.log(distribution(0.0)),
    reference_logits=np.log(distribution(-1.0)),
    true_rewards=np.zeros(len(RESPONSES)),
    beta=BETA,
)
"""The same prompt with whole responses as the K outcomes."""
SEQUENCE_T_PILAF = (TABULAR.mixed(BETA) * TABULAR.z(1))[:, None] * (TABULAR.mixed(-BETA) * TABULAR.z(-1))[None, :]
ON_POLICY = np.outer(TABULAR.policy, TABULAR.policy)
MIXED = np.outer(distribution(BETA), distribution(-BETA))
"""Token by token, as the generator samples: not the outer product of sequence-level π⁺ and π⁻."""


def plans(sampler: PairSampler, count: int) -> list[PairPlan]:
    prompt = Prompt(prompt_id="p", text="t", token_ids=(1,))
    return [sampler.plan(prompt, run_seed=1, epoch=0, draw=draw, index=draw) for draw in range(count)]


async def drawn(sampler: PairSampler, source: PairSource, count: int) -> list[ResponsePair]:
    return [await source.draw(plan) for plan in plans(sampler, count)]


def places(pair: ResponsePair) -> tuple[int, int]:
    return RESPONSES.index(pair.a.token_ids), RESPONSES.index(pair.b.token_ids)


def assert_chi_square(pairs: Sequence[ResponsePair], expected: dict[str, Array]) -> None:
    """Counts by branch and responses against probabilities; cells below 5 are pooled; α = 0.001."""
    names = list(expected)
    counts = {name: np.zeros((len(RESPONSES), len(RESPONSES))) for name in names}
    for pair in pairs:
        counts[pair.branch][places(pair)] += 1
    seen = np.concatenate([counts[name].ravel() for name in names])
    wanted = len(pairs) * np.concatenate([expected[name].ravel() for name in names])
    assert wanted.sum() == pytest.approx(len(pairs))
    large = wanted >= 5
    seen, wanted = (np.append(x[large], x[~large].sum()) for x in (seen, wanted))
    keep = wanted > 0
    assert seen[~keep].sum() == 0
    statistic, freedom = ((seen[keep] - wanted[keep]) ** 2 / wanted[keep]).sum(), keep.sum() - 1
    # Wilson and Hilferty's 0.999 quantile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def z_products() -> Array:
    plus = np.array([log_z_sample(respond(y, BETA)) for y in RESPONSES], dtype=float)
    minus = np.array([log_z_sample(respond(y, -BETA)) for y in RESPONSES], dtype=float)
    return plus[:, None] + minus[None, :]


def test_samples_of_z_are_unbiased_and_turn_token_level_draws_into_sequence_level_ones() -> None:
    plus = np.exp([log_z_sample(respond(y, BETA)) for y in RESPONSES])  # type: ignore[arg-type]
    assert distribution(BETA) @ plus == pytest.approx(TABULAR.z(1), rel=1e-12)
    np.testing.assert_allclose(distribution(BETA) * plus, TABULAR.mixed(BETA) * TABULAR.z(1), rtol=1e-12)
    assert log_z_sample(respond((0, 1), 0.0)) is None
    assert log_z_sample(respond((0, 1), -1.0)) == pytest.approx(0.0, abs=1e-12)


def test_weighted_draws_are_t_pilaf_exactly_whichever_coin() -> None:
    """The loss-weighted measure is ½(π·π + Z⁺π⁺·Z⁻π⁻) with sequence-level π^±: the theory's, up to ½(1 + Z⁺Z⁻)."""
    theory = 0.5 * (ON_POLICY + SEQUENCE_T_PILAF)
    odds = z_products()
    keep = np.vectorize(t_pilaf_branch_probability)(odds)
    weight = np.vectorize(t_pilaf_loss_weight)(odds)
    weighted = MIXED * keep * weight + (MIXED * (1 - keep) * weight).sum() * ON_POLICY
    np.testing.assert_allclose(weighted, theory, rtol=1e-12)
    np.testing.assert_allclose(0.5 * ON_POLICY + 0.5 * MIXED * np.exp(odds), theory, rtol=1e-12)
    # Without the weight it is not: neither plain PILAF nor the token-level pair.
    assert abs(0.5 * (ON_POLICY + MIXED) - theory / theory.sum()).sum() > 0.02


async def test_pilaf_pairs_follow_the_mixture() -> None:
    pairs = await drawn(PilafSampler(beta=BETA), SidePairs(World()), 12_000)
    assert_chi_square(pairs, {"on_policy": 0.5 * ON_POLICY, "interpolated": 0.5 * MIXED})
    mixed = [pair for pair in pairs if pair.branch == "interpolated"]
    assert all(p.draw is not None and p.draw.log_z_a == log_z_sample(p.a) for p in mixed)
    assert {p.loss_weight for p in pairs} == {1.0}
    hot = await drawn(PilafSampler(beta=BETA), SidePairs(World(), knows_z=False), 20)
    assert {p.draw.log_z_a for p in hot if p.draw} == {None}, "at another temperature the draws say nothing of Z"


async def test_hybrid_pairs_follow_policy_and_reference() -> None:
    pairs = await drawn(HybridSampler(), SidePairs(World()), 6_000)
    assert_chi_square(pairs, {"hybrid": np.outer(TABULAR.policy, TABULAR.reference)})


async def test_weighted_coin_keeps_and_replaces_as_it_should() -> None:
    sampler = TPilafSampler(beta=BETA, weighted_coin=True)
    pairs = await drawn(sampler, ZWeightedPairs(World(), max_weight=math.inf), 12_000)
    keep = np.vectorize(t_pilaf_branch_probability)(z_products())
    replaced = (MIXED * (1 - keep)).sum() * ON_POLICY
    assert_chi_square(pairs, {"interpolated": MIXED * keep, "on_policy": replaced})
    for pair in pairs[:50]:
        assert pair.draw is not None and pair.draw.log_z_a is not None and pair.draw.log_z_b is not None
        product = math.exp(pair.draw.log_z_a + pair.draw.log_z_b)
        assert pair.loss_weight == pytest.approx(0.5 * (1 + product))
        replaced_pair = pair.branch == "on_policy"
        assert pair.draw.cost.sequence_forwards == (6 if replaced_pair else 4)
        assert pair.draw.cost.generated_tokens == (8 if replaced_pair else 4)
        assert (pair.a.coefficient == 0.0) is replaced_pair
    again = await drawn(sampler, ZWeightedPairs(World(), max_weight=math.inf), 200)
    assert again == pairs[:200], "identity fixes the branch, too"


async def test_fair_coin_has_the_weight_in_the_mixed_pairs_alone() -> None:
    sampler = TPilafSampler(beta=BETA, weighted_coin=False)
    pairs = await drawn(sampler, ZWeightedPairs(World(), max_weight=1.5), 400)
    odds = z_products()
    for pair in pairs:
        expected = 1.0 if pair.branch == "on_policy" else min(math.exp(odds[places(pair)]), 1.5)
        assert pair.loss_weight == pytest.approx(expected)
    assert max(pair.loss_weight for pair in pairs) == 1.5, "the cap binds somewhere"


async def test_best_of_n_by_implicit_reward() -> None:
    world = World()
    source = CandidatePairs(world, scorer=ImplicitRewardScorer(world, beta=BETA), choose=choose_best_against_worst)
    pairs = await drawn(BestOfNSampler(n=3, scorer="implicit_reward"), source, 8_000)
    assert_chi_square(pairs, {"best_of_n": best_of_n_pairs(TABULAR, n=3)})
    assert world.calls == {"generate": 24_000, "reference": 24_000}, "the oracle was not asked while sampling"
    assert world.scored_for == [pair.plan.pair_id for pair in pairs], "a pair that kills its scorer can be found"


async def test_best_of_n_by_the_oracle_reads_every_candidate() -> None:
    world = World()
    source = CandidatePairs(world, scorer=OracleScorer(world), choose=choose_best_against_worst)
    pairs = await drawn(BestOfNSampler(n=4, scorer="oracle"), source, 4_000)
    scores = np.arange(len(RESPONSES), dtype=float)
    assert_chi_square(pairs, {"best_of_n": best_of_n_pairs(TABULAR, n=4, scores=scores)})
    assert world.calls["oracle"] == 16_000
    assert world.scored_for == [pair.plan.pair_id for pair in pairs]


@pytest.mark.parametrize("distinct", [False, True])
async def test_resampling_by_the_reward_model(distinct: bool) -> None:
    world = World()
    choose = partial(resample_by_reward, distinct=distinct)
    source = CandidatePairs(world, scorer=RewardModelScorer(world), choose=choose)
    pairs = await drawn(PilafRewardSampler(candidates=2, scorer="reward_model"), source, 8_000)
    expected = np.zeros((len(RESPONSES), len(RESPONSES)))
    for pool in itertools.product(range(len(RESPONSES)), repeat=2):
        chance = float(np.prod(TABULAR.policy[list(pool)]))
        plus = np.exp([REWARDS[i] for i in pool])
        minus = 1 / plus
        for a, b in itertools.product(range(2), repeat=2):
            second = float(a != b) if distinct else minus[b] / minus.sum()
            expected[pool[a], pool[b]] += chance * plus[a] / plus.sum() * second
    assert_chi_square(pairs, {"resampled": expected})
    assert {p.draw.scorer_version for p in pairs if p.draw} == {7}
    first = pairs[0].draw
    assert first is not None and first.log_z_a is not None


@pytest.mark.parametrize(
    ("sampler", "forwards", "labelled", "scoring"),
    [
        (VanillaSampler(), 2, 2, 0),
        (PilafSampler(beta=BETA), 3, 2, 0),
        (HybridSampler(), 2, 2, 0),
        (BestOfNSampler(n=8, scorer="implicit_reward"), 8, 2, 8),
        (BestOfNSampler(n=8, scorer="oracle"), 8, 8, 0),
        (TPilafSampler(beta=BETA, weighted_coin=False), 3, 2, 0),
    ],
    ids=["vanilla", "pilaf", "hybrid", "best_of_8", "best_of_8_oracle", "t_pilaf_fair"],
)
async def test_counted_costs_are_the_papers_table(
    sampler: PairSampler, forwards: int, labelled: int, scoring: int
) -> None:
    """Table 1: 2, 3, 2, 8, 8 forwards and 2, 2, 2, 2, 8 labelled responses, counted over drawn pairs."""
    world, n = World(), 2_000
    sources: dict[type[PairSampler], PairSource] = {
        BestOfNSampler: CandidatePairs(
            world,
            scorer=OracleScorer(world) if labelled == 8 else ImplicitRewardScorer(world, beta=BETA),
            choose=choose_best_against_worst,
        ),
        TPilafSampler: ZWeightedPairs(world, max_weight=math.inf),
    }
    pairs = await drawn(sampler, sources.get(type(sampler), SidePairs(world)), n)
    costs = [pair.draw.cost for pair in pairs if pair.draw is not None]
    # A fair coin's deviation is one forward a pair.
    tolerance = 4 / math.sqrt(n) if forwards == 3 else 0
    assert sum(c.sequence_forwards for c in costs) / n == pytest.approx(forwards, abs=tolerance)
    assert {c.labelled_responses for c in costs} == {labelled}
    assert {c.scoring_forwards for c in costs} == {scoring}
    assert sum(c.generated_tokens for c in costs) == world.calls["generate"] * LENGTH
    assert sampler.expected_cost.sequence_forwards == forwards
    assert sampler.expected_cost.labelled_responses == labelled
    assert world.calls["reference"] == (scoring * n if scoring else 0)
