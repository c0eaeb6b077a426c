"""What pairs cost, counted as the paper's Table 1 counts: sequence forwards and labels."""

from typing import Literal

from pilaf_ray.types import PairCost

CandidateScorer = Literal["implicit_reward", "reward_model", "oracle"]

REFERENCE_COEFFICIENT = -1.0


def response_forwards(coefficient: float) -> int:
    """Networks that a response runs through: a pure policy or reference response costs one."""
    return 1 if coefficient in (0.0, REFERENCE_COEFFICIENT) else 2


def sides_cost(coefficient_a: float, coefficient_b: float) -> PairCost:
    """A pair of two responses: vanilla 2, (+β, −β) 4, hybrid 2 forwards."""
    forwards = response_forwards(coefficient_a) + response_forwards(coefficient_b)
    return PairCost(sequence_forwards=forwards, labelled_responses=2)


def candidate_cost(candidates: int, scorer: CandidateScorer) -> PairCost:
    """A pair chosen from ``candidates`` draws of π.

    The implicit reward asks the reference about each (π's log-probabilities are known from
    sampling), a reward model asks itself; an oracle that scores has read, so labelled, all.
    """
    if scorer == "oracle":
        return PairCost(sequence_forwards=candidates, labelled_responses=candidates)
    return PairCost(sequence_forwards=candidates, scoring_forwards=candidates, labelled_responses=2)
