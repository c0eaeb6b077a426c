"""What the ledger is told and answers, beside the messages of :mod:`pilaf_ray.types`. Plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pilaf_ray.errors import LedgerError
from pilaf_ray.types import LabeledPair, PairPlan, PairState, ResponsePair

HUMAN = "human"
"""Source of labels that people gave; they outlive every roll-back."""

ENDED = (PairState.ABSTAINED, PairState.REJECTED, PairState.EXPIRED)
"""States of pairs that will never be trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerCounts:
    """How many pairs are where. Invariant: planned = in flight + sampled + labeled + trained + ended.

    Example: ``ledger.counts().check()[PairState.TRAINED]``
    """

    planned: int
    """Pairs ever planned: one more than the highest plan index, whatever became of them."""
    by_state: Mapping[PairState, int]
    """Pairs in each state, zeros included."""

    def __getitem__(self, state: PairState) -> int:
        """Pairs in ``state``."""
        return self.by_state[state]

    @property
    def in_flight(self) -> int:
        """Planned, and without responses so far."""
        return self.by_state[PairState.PLANNED]

    @property
    def ended(self) -> int:
        """Abstained, rejected or expired."""
        return sum(self.by_state[state] for state in ENDED)

    @property
    def labels(self) -> int:
        """Pairs that carry a label, each once."""
        return self.by_state[PairState.LABELED] + self.by_state[PairState.TRAINED]

    def check(self) -> "LedgerCounts":
        """Itself; raises LedgerError where a pair is missing, or in two places."""
        found = sum(self.by_state.values())
        if found != self.planned:
            states = ", ".join(f"{count} {state}" for state, count in self.by_state.items())
            raise LedgerError(f"the ledger does not add up: {self.planned} pairs were planned, but there are {states}")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfinishedWork:
    """Pairs that an interrupted run left behind, each kind in order of plan index."""

    planned: Sequence[PairPlan] = ()
    sampled: Sequence[ResponsePair] = ()
    labeled: Sequence[LabeledPair] = ()


class LabelKind(StrEnum):
    """What a label event is."""

    VOTE = "vote"
    """One annotator's answer, of which several may make a label."""
    SKIP = "skip"
    """One annotator's refusal to judge: the pair goes to others, and counts as unanswered."""
    VERDICT = "verdict"
    """The label that a pair carries and is trained on."""
    WITHDRAWAL = "withdrawal"
    """Takes an earlier vote back; the vote stays in the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One annotator's answer on its way into the ledger.

    Example: ``Vote(key="form-17", pair_id="x", annotator="ada", probability=0.9)``
    """

    key: str
    """Made by whoever sends the vote, once; sent again under the same key it is the same vote."""
    pair_id: str
    annotator: str
    probability: float | None
    """P(a ≻ b) in [0, 1]; None is an abstention."""
    source: str = HUMAN
    reason: str | None = None
    lease_id: int | None = None
    """The lease it answers, which ends with it."""
    details: str | None = None
    """What the annotator saw and chose, as JSON: the probability can be computed anew from it."""
    skip: bool = False
    """Not an answer: the annotator leaves the pair to others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelEvent:
    """A line of the label log."""

    sequence: int
    key: str
    pair_id: str
    sampling: int
    """Which sampling of the pair's responses it speaks of, from 0."""
    kind: LabelKind
    source: str
    annotator: str | None
    probability: float | None
    reason: str | None
    reward_a: float | None
    reward_b: float | None
    withdraws: int | None
    details: str | None
    late: bool
    """It came when its pair did not wait for it any more: kept, and without effect."""
    created_at: int
    """UTC, milliseconds."""


class LeaseOutcome(StrEnum):
    """How a lease ended."""

    ANSWERED = "answered"
    RELEASED = "released"
    EXPIRED = "expired"
    VOID = "void"
    """The pair left its queue meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A pair in somebody's hands until ``deadline``. Times are UTC in milliseconds."""

    lease_id: int
    pair_id: str
    holder: str
    granted_at: int
    deadline: int
    renewals: int
    outcome: LeaseOutcome | None
    """None while it is open."""
