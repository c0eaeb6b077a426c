"""Mixes the two models' logits inside the engine, each request with its own coefficient.

The interpolated model returns the policy's logits, as wide as vLLM expects, and
leaves the reference's logits of the mixed requests on the :class:`ReferenceShelf` of
the same engine. The processor takes them from there before temperature and top-p, so
everything behind it (sampling, log-probabilities) sees one ordinary distribution.
Prompt log-probabilities do not pass a processor: they are the policy's own.
"""

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

COEFFICIENT_KEY = "pilaf_coefficient"


class ReferenceShelf:
    """What model and processor of one engine tell each other about the step under way.

    The processor knows which requests of the batch are mixed and says so before the
    forward pass; the model leaves the reference's logits of those requests. One shelf an
    engine: both sides find it by the id of their shared configuration, so several engines
    fit in one process.
    """

    _shelves: ClassVar[dict[str, "ReferenceShelf"]] = {}

    def __init__(self) -> None:
        self.mixed_rows: tuple[int, ...] = ()
        """Places of the mixed requests in the batch, ascending."""
        self._wanted = False
        self._logits: torch.Tensor | None = None

    def begin_step(self) -> None:
        """A new forward pass follows; said by the processor, as a replayed CUDA graph runs no code of the model."""
        self._wanted = True

    def claim_rows(self) -> tuple[int, ...]:
        """Rows whose logits the step lacks, told once: later logits are for prompts, not for sampling."""
        wanted, self._wanted = self._wanted, False
        return self.mixed_rows if wanted else ()

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


def mix_logits(policy: torch.Tensor, reference: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """(1 + c)·policy − c·reference in fp32; shapes (rows, vocab), (rows, vocab), (rows,).

    A token that either side rules out (−inf: padding, a mask) stays ruled out;
    without this, c = −1 would turn a masked entry into NaN. Rows with c = 0 are the
    policy's, bit for bit.
    """
    policy, reference = policy.float(), reference.float()
    scale = coefficient.unsqueeze(1)
    mixed = (1 + scale) * policy - scale * reference
    allowed = policy.isfinite() & reference.isfinite()
    mixed = torch.where(allowed, mixed, -math.inf)
    return torch.where(scale == 0, policy, mixed)


class MixingProcessor(LogitsProcessor):
    """vLLM V1 logits processor; ``SamplingParams.extra_args[COEFFICIENT_KEY]`` holds c.

    It depends on per-request constants only, so it is safe under asynchronous
    scheduling, preemption and chunked prefill.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        self._shelf = ReferenceShelf.of(vllm_config)
        rows = vllm_config.scheduler_config.max_num_seqs
        self._host = torch.zeros(rows, dtype=torch.float32, pin_memory=is_pin_memory)
        self._coefficients = torch.zeros(0, dtype=torch.float32, device=device)
        self._rows = torch.zeros(0, dtype=torch.long, device=device)

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a coefficient that is not a finite number (ValueError)."""
        value = _coefficient_of(sampling_params)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"extra_args[{COEFFICIENT_KEY!r}] must be a finite number, not {value!r}")

    def is_argmax_invariant(self) -> bool:
        """False: mixing changes the order of tokens, so greedy requests need it too."""
        return False

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """Follow requests through the batch: removed, then added, then moved."""
        self._shelf.begin_step()
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._set(index, 0.0)
        for index, params, _, _ in batch_update.added:
            self._set(index, float(_coefficient_of(params)))
        for source, target, direction in batch_update.moved:
            moved, replaced = self._host[source].item(), self._host[target].item()
            self._set(target, moved)
            self._set(source, replaced if direction is MoveDirectionality.SWAP else 0.0)
        rows = self._host.nonzero().flatten()
        self._shelf.mixed_rows = tuple(rows.tolist())
        self._rows = rows.to(self._coefficients.device)
        self._coefficients = self._host[rows].to(self._coefficients.device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mix ``logits``, shape (requests, vocab); untouched where every c is 0."""
        if not self._shelf.mixed_rows:
            return logits
        mixed = mix_logits(logits[self._rows], self._shelf.take(), self._coefficients)
        return logits.index_copy(0, self._rows, mixed.to(logits.dtype))

    def _set(self, index: int, value: float) -> None:
        self._host[index] = value


def _coefficient_of(params: "SamplingParams") -> float:
    """The request's c; 0 (the plain policy) where none was given."""
    value: float = (params.extra_args or {}).get(COEFFICIENT_KEY, 0.0)
    return value
