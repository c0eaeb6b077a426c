"""One learner step, as those hear of it who keep records."""

from collections.abc import Sequence
from dataclasses import dataclass

from pilaf_ray.pipeline.budget import Spent
from pilaf_ray.types import LabeledPair, StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One learner step as the controller saw it."""

    result: StepResult
    batch: Sequence[LabeledPair]
    ages: Sequence[int]
    """Policy versions between sampling and training, pair by pair."""
    wait_seconds: float
    train_seconds: float
    push_seconds: float
    """The ledger's write and the learner's part of the weight update, which it cannot train through."""
    evaluation_seconds: float
    """What the learner waited beside that because its next version may not be served before an evaluation is over."""
    sync_seconds: float
    """What it took until every generator served the version before this one."""
    in_flight: int
    is_first_use: bool = True
    """Whether the batch's pairs were trained on for the first time."""
    spent: Spent | None = None
    """By the run, this step included."""
