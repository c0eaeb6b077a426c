"""How good the candidates of a plan are: by r_θ, by the reward model r̂, or by the oracle itself.

A candidate that kills whoever scores it has to be recognised, so each question to replicas names the plan's pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pilaf_ray.pipeline.ports import RewardScorer, SequenceScorer, TextScorer
from pilaf_ray.types import PairPlan, SampledResponse, ScoringItem


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateScores:
    """Scores of candidates, in order, and what they cost."""

    values: Sequence[float]
    scoring_forwards: int = 0
    labelled_responses: int = 2
    """Responses that the oracle reads for the pair: its two sides, or every candidate."""
    version: int | None = None


class CandidateScorer(Protocol):
    """Says how good responses to a plan's prompt are."""

    async def score(self, plan: PairPlan, responses: Sequence[SampledResponse]) -> CandidateScores:
        """One number a response; higher is better. Raises PoisonPairError where no replica survives them."""
        ...


class ImplicitRewardScorer:
    """r_θ = β·(log π − log π_ref); π's part is known from sampling, at temperature 1 and top-p 1.

    Scores are rounded to 0.01: at the reference all candidates tie but for the rounding of two implementations
    (about 1e-4 a response), and which two become the pair must not hang on how a batch was put together.
    """

    def __init__(self, reference: SequenceScorer, *, beta: float) -> None:
        self._reference = reference
        self._beta = beta

    async def score(self, plan: PairPlan, responses: Sequence[SampledResponse]) -> CandidateScores:
        """One forward of the reference a response."""
        items = [(plan.prompt.token_ids, y.token_ids) for y in responses]
        references = await self._reference.score_responses(items, pairs=[plan.pair_id])
        values = [round(self._beta * (sum(y.logprobs) - r), 2) for y, r in zip(responses, references, strict=True)]
        return CandidateScores(values=values, scoring_forwards=len(responses))


class RewardModelScorer:
    """r̂ of the reward learner. Its ranks are one group, whose loss is the learner's: no pair is suspected."""

    def __init__(self, reward: RewardScorer) -> None:
        self._reward = reward

    async def score(self, plan: PairPlan, responses: Sequence[SampledResponse]) -> CandidateScores:
        """One forward of r̂ a response."""
        items = [ScoringItem(prompt=plan.prompt, token_ids=y.token_ids, text=y.text) for y in responses]
        scores = await self._reward.score(items)
        return CandidateScores(values=scores.values, scoring_forwards=len(responses), version=scores.version)


class OracleScorer:
    """r* itself: the oracle reads, and so labels, every candidate."""

    def __init__(self, oracle: TextScorer) -> None:
        self._oracle = oracle

    async def score(self, plan: PairPlan, responses: Sequence[SampledResponse]) -> CandidateScores:
        """One reading by the oracle a response."""
        prompts = [plan.prompt.text] * len(responses)
        values = await self._oracle.score_texts(prompts, [y.text for y in responses], pairs=[plan.pair_id])
        return CandidateScores(values=values, labelled_responses=len(responses))
