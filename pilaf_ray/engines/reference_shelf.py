"""What the parts of one engine's worker tell each other about the step under way."""

from typing import TYPE_CHECKING, ClassVar

import torch

from pilaf_ray.engines.draft_counts import DraftCounter
from pilaf_ray.engines.token_records import TokenRecords

if TYPE_CHECKING:
    from vllm.config import VllmConfig

POLICY, REFERENCE = "policy", "reference"
"""The two networks of an interpolated model: its attributes, and the prefixes of their layers."""


class ReferenceShelf:
    """Between processor, model and, where tokens are drafted ahead, the model's runner.

    The processor knows which requests of the batch are mixed and says so before the
    forward pass; the model leaves the reference's logits of those requests. One shelf an
    engine: both sides find it by the id of their shared configuration, so several engines
    fit in one process.
    """

    _shelves: ClassVar[dict[str, "ReferenceShelf"]] = {}

    def __init__(self) -> None:
        self.mixed_rows: tuple[int, ...] = ()
        """Places of the mixed requests in the batch, ascending."""
        self.deferred = False
        """The runner asks the reference itself, once the policy has drafted."""
        self._wanted = False
        self._logits: torch.Tensor | None = None
        self.records = TokenRecords()
        self.counter = DraftCounter()

    def begin_step(self) -> None:
        """A new forward pass follows; said by the processor, as a replayed CUDA graph runs no code of the model."""
        self._wanted = True

    def claim_rows(self) -> tuple[int, ...] | None:
        """Rows whose logits the step lacks, told once; None: later logits are for prompts, not for sampling."""
        wanted, self._wanted = self._wanted, False
        if not wanted:
            return None
        return () if self.deferred else self.mixed_rows

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "ReferenceShelf":
        """The shelf of the engine that ``vllm_config`` belongs to."""
        return cls._shelves.setdefault(vllm_config.instance_id, cls())

    def put(self, logits: torch.Tensor) -> None:
        """Keep ``logits``, shape (mixed rows, vocab), until they are taken."""
        self._logits = logits

    def take(self) -> torch.Tensor:
        """Hand out the logits of the last forward pass, once.

        Raises:
            RuntimeError: there are none, or they belong to another batch.
        """
        logits, self._logits = self._logits, None
        rows = len(self.mixed_rows)
        if logits is None or logits.shape[0] != rows:
            found = "none" if logits is None else f"{logits.shape[0]} rows"
            raise RuntimeError(f"mixing {rows} rows needs as many rows of reference logits; found {found}")
        return logits
