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
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from pilaf_ray.engines.reference_shelf import ReferenceShelf
from pilaf_ray.engines.row_draws import (
    COEFFICIENT_KEY,
    Draw,
    Row,
    coefficient_of,
    draft,
    mix_logits,
    own_logprobs,
    row_logprobs,
    settle,
)

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate


class MixingProcessor(LogitsProcessor):
    """vLLM V1 logits processor; ``SamplingParams.extra_args`` holds c and, for a drawn request, a draw.

    A draw depends on the request's seed and on how many tokens it has, so asynchronous scheduling,
    preemption and chunked prefill change nothing.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        self._shelf = ReferenceShelf.of(vllm_config)
        self._device = device
        self._rows: dict[int, Row] = {}
        self._mixed = torch.zeros(0, dtype=torch.long, device=device)
        self._coefficients = torch.zeros(0, dtype=torch.float32, device=device)
        self._drawn: tuple[int, ...] = ()

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a coefficient that is not a finite number (ValueError)."""
        value = coefficient_of(sampling_params)
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
            rows[index] = Row.of(params, output)
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

    def apply(self, logits: Tensor) -> Tensor:
        """Log-probabilities in place of ``logits``, shape (requests, vocab); drawn rows allow one token."""
        if not self._rows:
            return logits
        policy, reference = logits, None
        if self._shelf.mixed_rows:
            reference = self._shelf.take()
            mixed = mix_logits(policy[self._mixed], reference, self._coefficients)
            logits = logits.index_copy(0, self._mixed, mixed.to(logits.dtype))
        draws = [row.draw if row else None for row in map(self._rows.get, range(logits.shape[0]))]
        logprobs = row_logprobs(logits, draws)
        tokens = self._plain_tokens(logprobs)
        if reference is not None:
            tokens |= self._mixed_tokens(policy, reference, logprobs)
        if tokens:
            index = torch.tensor(list(tokens), device=self._device)
            drawn = torch.stack(list(tokens.values()))
            chosen = logprobs[index, drawn]
            logprobs[index] = -math.inf
            logprobs[index, drawn] = chosen
        return logprobs

    def _plain_tokens(self, logprobs: Tensor) -> dict[int, Tensor]:
        """The tokens that requests without a reference draw, by place."""
        places = [place for place in self._drawn if not self._rows[place].coefficient]
        if not places:
            return {}
        draws, positions = self._draws(places)
        return dict(zip(places, draft(logprobs[places], draws, positions), strict=True))

    def _mixed_tokens(self, policy: Tensor, reference: Tensor, logprobs: Tensor) -> dict[int, Tensor]:
        """The tokens that mixed requests draw, by place: the policy's, kept or replaced; and their records."""
        found = [(number, place) for number, place in enumerate(self._shelf.mixed_rows) if self._rows[place].draw]
        if not found:
            return {}
        numbers, places = (list(side) for side in zip(*found, strict=True))
        draws, positions = self._draws(places)
        own = row_logprobs(policy[places], draws)
        tokens, kept = settle(own, logprobs[places], draft(own, draws, positions), draws, positions)
        self._shelf.records.add(
            [draw.record for draw in draws], positions, own_logprobs(policy[places], reference[numbers], tokens)
        )
        self._shelf.counter.add(drafted=len(places), judged=len(places), kept=kept, passes=len(places))
        return dict(zip(places, tokens, strict=True))

    def _draws(self, places: Sequence[int]) -> tuple[list[Draw], list[int]]:
        """How the drawn requests at ``places`` draw, and at which position."""
        rows = [self._rows[place] for place in places]
        return [row.draw for row in rows if row.draw], [len(row.output) for row in rows]
