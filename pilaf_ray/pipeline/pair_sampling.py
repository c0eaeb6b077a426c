"""From a plan to a pair of responses: what is drawn, which two are kept, with which weight and at what cost.

Every random choice derives from the pair's identity, so a pair that is drawn again under
the same weights comes out the same, also where the choice depends on what was drawn.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from pilaf_ray.pipeline.candidate_scoring import CandidateScorer
from pilaf_ray.pipeline.ports import GeneratorPort
from pilaf_ray.sampling.candidates import CandidatePair, ResampledPair
from pilaf_ray.sampling.costs import sides_cost
from pilaf_ray.sampling.identity import derive_uniform
from pilaf_ray.sampling.normalizers import (
    log_z_sample,
    t_pilaf_branch_probability,
    t_pilaf_loss_weight,
    z_value,
)
from pilaf_ray.types import (
    GenerationRequest,
    PairCost,
    PairDraw,
    PairPlan,
    ResponsePair,
    SampledResponse,
)

Choose = Callable[[str, Sequence[float]], CandidatePair]
"""(pair id, scores of the candidates) to the two that become the pair."""


class PairSource(Protocol):
    """Makes a pair of responses from a plan."""

    async def draw(self, plan: PairPlan) -> ResponsePair:
        """Sample what the plan asks for; returns when both sides are known."""
        ...


class ResponseDrawer:
    """Asks the generators for the responses that a plan names."""

    def __init__(self, generator: GeneratorPort) -> None:
        self._generator = generator

    async def sides(self, plan: PairPlan) -> tuple[SampledResponse, SampledResponse]:
        """Both planned sides, at the same time."""
        a, b = await asyncio.gather(
            self._one(plan, "a", plan.coefficient_a, plan.seed_a),
            self._one(plan, "b", plan.coefficient_b, plan.seed_b),
        )
        return a, b

    async def candidates(self, plan: PairPlan) -> list[SampledResponse]:
        """The planned candidates from π, at the same time."""
        seeds = enumerate(plan.candidate_seeds)
        return list(await asyncio.gather(*(self._one(plan, f"c{number}", 0.0, seed) for number, seed in seeds)))

    async def _one(self, plan: PairPlan, name: str, coefficient: float, seed: int) -> SampledResponse:
        return await self._generator.generate(
            GenerationRequest(
                request_id=f"{plan.pair_id}-{name}",
                prompt_token_ids=plan.prompt.token_ids,
                coefficient=coefficient,
                seed=seed,
            )
        )


class SidePairs:
    """Sides a and b as they are planned: ``vanilla``, ``pilaf``, ``hybrid`` and ``mix``.

    Args:
        knows_z: temperature and top-p are 1, so that draws of mixed responses give samples of Z.
    """

    def __init__(self, generator: GeneratorPort, *, knows_z: bool = True) -> None:
        self._drawer = ResponseDrawer(generator)
        self._knows_z = knows_z

    async def draw(self, plan: PairPlan) -> ResponsePair:
        """Sample both sides."""
        a, b = await self._drawer.sides(plan)
        draw = PairDraw(
            branch=plan.branch,
            cost=_with_tokens(sides_cost(a.coefficient, b.coefficient), [a, b]),
            log_z_a=log_z_sample(a) if self._knows_z else None,
            log_z_b=log_z_sample(b) if self._knows_z else None,
        )
        return ResponsePair(plan=plan, a=a, b=b, draw=draw)


class ZWeightedPairs:
    """``t_pilaf``: branch or loss weight, or both, follow the pair's own sample w of Z⁺Z⁻.

    With the plan's candidates at hand the coin is weighted: the mixed pair is kept with probability
    w/(1 + w), a pair from π replaces it otherwise, and either is trained on with weight (1 + w)/2.
    Without candidates the plan has drawn a fair coin, and mixed pairs are trained on with weight w.
    Both are exact, with one sample and for sequences: docs/algorithms.md.

    Args:
        max_weight: cap of the loss weight, or none.
    """

    def __init__(self, generator: GeneratorPort, *, max_weight: float) -> None:
        self._drawer = ResponseDrawer(generator)
        self._max_weight = max_weight

    async def draw(self, plan: PairPlan) -> ResponsePair:
        """Sample both sides, and replace them where the weighted coin says so."""
        a, b = await self._drawer.sides(plan)
        cost = _with_tokens(sides_cost(a.coefficient, b.coefficient), [a, b])
        if not plan.coefficient_a:
            return ResponsePair(plan=plan, a=a, b=b, draw=PairDraw(branch=plan.branch, cost=cost))
        plus, minus = log_z_sample(a), log_z_sample(b)
        assert plus is not None and minus is not None, "a mixed response without both networks' log-probabilities"
        branch, weight, chosen = plan.branch, min(z_value(plus + minus), self._max_weight), None
        if plan.candidate_seeds:
            weight = t_pilaf_loss_weight(plus + minus, cap=self._max_weight)
            if derive_uniform(plan.pair_id, "z_coin") >= t_pilaf_branch_probability(plus + minus):
                a, b = await self._drawer.candidates(plan)
                branch, chosen = "on_policy", (0, 1)
                cost = cost + _with_tokens(PairCost(sequence_forwards=2, labelled_responses=0), [a, b])
        draw = PairDraw(
            branch=branch,
            cost=cost,
            loss_weight=weight,
            log_z_a=plus,
            log_z_b=minus,
            candidate_a=chosen[0] if chosen else None,
            candidate_b=chosen[1] if chosen else None,
        )
        return ResponsePair(plan=plan, a=a, b=b, draw=draw)


class CandidatePairs:
    """``best_of_n`` and ``pilaf_reward``: two of the plan's candidates, chosen by their scores."""

    def __init__(self, generator: GeneratorPort, *, scorer: CandidateScorer, choose: Choose) -> None:
        self._drawer = ResponseDrawer(generator)
        self._scorer = scorer
        self._choose = choose

    async def draw(self, plan: PairPlan) -> ResponsePair:
        """Sample the pool, score it and keep two."""
        pool = await self._drawer.candidates(plan)
        scores = await self._scorer.score(plan, pool)
        chosen = self._choose(plan.pair_id, scores.values)
        cost = PairCost(
            sequence_forwards=len(pool),
            scoring_forwards=scores.scoring_forwards,
            labelled_responses=scores.labelled_responses,
        )
        draw = PairDraw(
            branch=plan.branch,
            cost=_with_tokens(cost, pool),
            log_z_a=chosen.log_z_plus if isinstance(chosen, ResampledPair) else None,
            log_z_b=chosen.log_z_minus if isinstance(chosen, ResampledPair) else None,
            candidate_a=chosen.index_a,
            candidate_b=chosen.index_b,
            scorer_version=scores.version,
        )
        return ResponsePair(plan=plan, a=pool[chosen.index_a], b=pool[chosen.index_b], draw=draw)


def _with_tokens(cost: PairCost, responses: Sequence[SampledResponse]) -> PairCost:
    tokens = sum(len(response.token_ids) for response in responses)
    return cost + PairCost(sequence_forwards=0, generated_tokens=tokens, labelled_responses=0)
