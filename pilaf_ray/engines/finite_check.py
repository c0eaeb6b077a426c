"""What refuses a step whose loss or gradient is no number, and keeps the batch that it came from."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pilaf_ray.engines.training_engine import TrainingEngine
from pilaf_ray.errors import NonFiniteLossError


@dataclass(frozen=True, kw_only=True)
class FiniteCheck:
    """Made for one step; called with each number that the step hangs on, on all ranks together.

    Example: ``check = FiniteCheck(...); check("loss", loss); check("gradient", engine.step())``
    """

    engine: TrainingEngine
    """Of any network of the step: it knows the ranks."""
    batch: Sequence[Any]
    """Messages that the step is taken on; rank 0 saves them."""
    path: Path
    step: str
    """Names the step, e.g. ``step 3``."""
    outcome: str
    """What the reader may rely on, up to the path of the batch."""
    remedy: str
    """What may be changed before the next attempt."""

    def __call__(self, what: str, values: Tensor) -> None:
        """Return where ``values`` are finite on every rank.

        Raises:
            NonFiniteLossError: on every rank, whichever has the NaN or the infinity; the batch is saved.
        """
        if self.engine.all_finite(values):
            return
        if self.engine.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps([asdict(item) for item in self.batch]))
        raise NonFiniteLossError(f"{self.step}: the {what} is not finite; {self.outcome} {self.path}. {self.remedy}")
