"""Mixes the two models' logits inside the engine, each request with its own coefficient, and draws.

The interpolated model returns the policy's logits, as wide as vLLM expects, and
leaves the reference's logits of the mixed requests on the :class:`ReferenceShelf` of
the same engine. The processor takes them from there, mixes, and draws the next token of each
request that has a seed. To vLLM, which decodes greedily, it hands rows of log-probabilities: a row
that was drawn allows its token only. So the recorded number is the behaviour log-probability.
Prompt log-probabilities do not pass a processor: they are the policy's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from pilaf_ray.engines.token_records import TokenRecords
from pilaf_ray.sampling.draw import draw_tokens, token_uniform

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

COEFFICIENT_KEY = "pilaf_coefficient"
DRAW_KEY = "pilaf_draw"


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How a request's tokens are drawn; ``record`` names it in the shelf's records."""

    seed: int
    temperature: float
    top_p: float
    record: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A request at its place in the batch."""

    coefficient: float
    draw: Draw | None
    """None: the likeliest token, and log-probabilities at temperature 1."""
    output: Sequence[int]
    """vLLM's own list of the request's tokens; it grows."""


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
        self.records = TokenRecords()

    def begin_step(self) -> None:
        """A new forward pass follows; said by the processor, as a replayed CUDA graph runs no code of the model."""
        self._wanted = True

    def claim_rows(self) -> tuple[int, ...] | None:
        """Rows whose logits the step lacks, told once; None: later logits are for prompts, not for sampling."""
        wanted, self._wanted = self._wanted, False
        return self.mixed_rows if wanted else None

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
    """vLLM V1 logits processor; ``SamplingParams.extra_args`` holds c and, for a drawn request, a draw.

    A draw depends on the request's seed and on how many tokens it has, so asynchronous scheduling,
    preemption and chunked prefill change nothing.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        self._shelf = ReferenceShelf.of(vllm_config)
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._mixed = torch.zeros(0, dtype=torch.long, device=device)
        self._coefficients = torch.zeros(0, dtype=torch.float32, device=device)
        self._drawn: tuple[int, ...] = ()

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a coefficient that is not a finite number (ValueError)."""
        value = _coefficient_of(sampling_params)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"extra_args[{COEFFICIENT_KEY!r}] must be a finite number, not {value!r}")

    def is_argmax_invariant(self) -> bool:
        """False: mixing and drawing decide the token, and vLLM's greedy choice must see them."""
        return False

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """Follow requests through the batch: removed, then added, then moved."""
        self._shelf.begin_step()
        if batch_update is None:
            return
        rows = self._rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            draw = (params.extra_args or {}).get(DRAW_KEY)
            rows[index] = _Row(
                coefficient=float(_coefficient_of(params)), draw=Draw(**draw) if draw else None, output=output
            )
        for source, target, direction in batch_update.moved:
            moved, replaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if direction is MoveDirectionality.SWAP and replaced is not None:
                rows[source] = replaced
        mixed = sorted(index for index, row in rows.items() if row.coefficient)
        self._shelf.mixed_rows = tuple(mixed)
        self._mixed = torch.tensor(mixed, dtype=torch.long, device=self._device)
        self._coefficients = torch.tensor([rows[i].coefficient for i in mixed], device=self._device)
        self._drawn = tuple(sorted(index for index, row in rows.items() if row.draw))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities in place of ``logits``, shape (requests, vocab); drawn rows allow one token."""
        if not self._rows:
            return logits
        policy, reference = logits, None
        if self._shelf.mixed_rows:
            reference = self._shelf.take()
            policy = logits[self._mixed]
            mixed = mix_logits(policy, reference, self._coefficients)
            logits = logits.index_copy(0, self._mixed, mixed.to(logits.dtype))
        logprobs = self._truncated(logits).log_softmax(-1, dtype=torch.float32)
        if not self._drawn:
            return logprobs
        index = torch.tensor(self._drawn, device=self._device)
        draws = [self._rows[i] for i in self._drawn]
        uniforms = [token_uniform(row.draw.seed, len(row.output)) for row in draws if row.draw]
        tokens = draw_tokens(logprobs[index], uniforms)
        chosen = logprobs[index, tokens]
        logprobs[index] = -math.inf
        logprobs[index, tokens] = chosen
        if reference is not None:
            self._record(policy, reference, dict(zip(self._drawn, tokens, strict=True)))
        return logprobs

    def _truncated(self, logits: torch.Tensor) -> torch.Tensor:
        """Drawn rows at their temperature and within their top-p; the others as they are."""
        wanted = [row.draw for row in (self._rows.get(i) for i in range(logits.shape[0])) if row and row.draw]
        if all(draw.temperature == 1.0 and draw.top_p == 1.0 for draw in wanted):
            return logits
        index = torch.tensor(self._drawn, device=self._device)
        temperature = torch.tensor([draw.temperature for draw in wanted], device=self._device)
        rows = logits[index].float() / temperature.unsqueeze(1)
        if any(draw.top_p < 1.0 for draw in wanted):
            rows = apply_top_k_top_p(rows, None, torch.tensor([draw.top_p for draw in wanted], device=self._device))
        return logits.float().index_copy(0, index, rows)

    def _record(self, policy: torch.Tensor, reference: torch.Tensor, tokens: dict[int, torch.Tensor]) -> None:
        """Both networks' log-probabilities of the tokens that were drawn from their mixture."""
        places = [place for place, row in enumerate(self._shelf.mixed_rows) if row in tokens]
        rows = [self._rows[self._shelf.mixed_rows[place]] for place in places]
        if not rows:
            return
        drawn = torch.stack([tokens[self._shelf.mixed_rows[place]] for place in places]).unsqueeze(1)
        values = [
            (side.float().gather(1, drawn) - side.float().logsumexp(-1, keepdim=True))
            for side in (policy[places], reference[places])
        ]
        keys = [row.draw.record for row in rows if row.draw]
        self._shelf.records.add(keys, [len(row.output) for row in rows], torch.cat(values, dim=1))


def _coefficient_of(params: "SamplingParams") -> float:
    """The request's c; 0 (the plain policy) where none was given."""
    value: float = (params.extra_args or {}).get(COEFFICIENT_KEY, 0.0)
    return value
