"""What pairs cost, counted as the paper's Table 1 counts: sequence forwards and labels."""

from dataclasses import dataclass, field
from typing import Literal

from pilaf_ray.sampling.plans import MixtureBranch

CandidateScorer = Literal["implicit_reward", "reward_model", "oracle"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCost:
    """Cost of a pair, or the sum over many; expected costs are fractions."""

    sequence_forwards: float
    """Network passes over a sequence while sampling: one for π or π_ref, two for a mixture."""
    scoring_forwards: float = 0.0
    """Passes that only score candidates; the paper does not count them."""
    labelled_responses: float
    """Responses that the oracle reads."""

    def __add__(self, other: "PairCost") -> "PairCost":
        """Sum of two costs."""
        return PairCost(
            sequence_forwards=self.sequence_forwards + other.sequence_forwards,
            scoring_forwards=self.scoring_forwards + other.scoring_forwards,
            labelled_responses=self.labelled_responses + other.labelled_responses,
        )

    def scaled(self, factor: float) -> "PairCost":
        """The cost times a number."""
        return PairCost(
            sequence_forwards=self.sequence_forwards * factor,
            scoring_forwards=self.scoring_forwards * factor,
            labelled_responses=self.labelled_responses * factor,
        )


NOTHING = PairCost(sequence_forwards=0.0, labelled_responses=0.0)


def branch_cost(branch: MixtureBranch) -> PairCost:
    """A pair of one branch of a mixture: vanilla 2, (+β, −β) 4, hybrid 2 forwards."""
    return PairCost(sequence_forwards=branch.forwards, labelled_responses=2)


def t_pilaf_cost(interpolated_probability: float) -> PairCost:
    """Expected cost, 2 + 2·P(interpolated): the table's 3 at ½, more where r_θ varies."""
    return PairCost(sequence_forwards=2 + 2 * interpolated_probability, labelled_responses=2)


def candidate_cost(candidates: int, scorer: CandidateScorer) -> PairCost:
    """A pair chosen from ``candidates`` draws of π.

    The implicit reward asks the reference about each (π's log-probabilities are known from
    sampling), a reward model asks itself; an oracle that scores has read, so labelled, all.
    """
    if scorer == "oracle":
        return PairCost(sequence_forwards=candidates, labelled_responses=candidates)
    return PairCost(sequence_forwards=candidates, scoring_forwards=candidates, labelled_responses=2)


@dataclass(kw_only=True)
class CostCounter:
    """Adds up what a run's pairs cost."""

    pairs: int = 0
    total: PairCost = field(default=NOTHING)

    def add(self, cost: PairCost) -> None:
        """Count one pair."""
        self.pairs += 1
        self.total = self.total + cost

    @property
    def per_pair(self) -> PairCost:
        """Mean cost of a pair; nothing before the first."""
        return self.total.scaled(1.0 / self.pairs) if self.pairs else NOTHING
