"""vLLM's worker and model runner for an engine that drafts ahead (:mod:`pilaf_ray.engines.draft_step`).

A step that somebody only scores in, or whose window is one token, takes vLLM's own way through
:class:`pilaf_ray.engines.mixing_processor.MixingProcessor`. Tokens are the same by either.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from pilaf_ray.engines.draft_counts import best_window
from pilaf_ray.engines.draft_step import DraftingRow, DraftStep
from pilaf_ray.engines.row_draws import Row
from pilaf_ray.engines.side_forward import Stretch
from pilaf_ray.engines.speculation_settings import speculation_of
from pilaf_ray.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

_NO_TOKEN = -1
"""vLLM's mark of a place without a token."""


class SpeculativeModelRunner(CPUModelRunner):
    """Puts a :class:`DraftStep` between vLLM's forward and its bookkeeping.

    Nothing in it is for CPUs alone but its base; on GPUs nobody has tried it.

    Raises:
        ConfigError: the model keeps a state that cannot be taken back, or positions of more than one dimension.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device) -> None:
        super().__init__(vllm_config, device)
        if self.model_config.is_hybrid or self.model_config.is_attention_free or self.uses_mrope:
            raise ConfigError("generation.speculation needs a model of attention layers only: leave it out")
        self._speculation = speculation_of(vllm_config)
        self._drafting: list[DraftingRow] | None = None

    def _model_forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        """The policy's part only, where drafts follow."""
        # A rehearsal of vLLM's has no plans.
        planned = isinstance(get_forward_context().attn_metadata, dict)
        self._drafting = self._plan(input_ids) if planned and input_ids is not None else None
        self.model.shelf.deferred = self._drafting is not None
        return super()._model_forward(input_ids=input_ids, **inputs)

    def _plan(self, input_ids: Tensor) -> list[DraftingRow] | None:
        """The step's requests and how many tokens each may get; None: an ordinary step."""
        if self.num_prompt_logprobs or self.input_batch.logprob_token_ids:
            return None
        states = [self.requests[request_id] for request_id in self.input_batch.req_ids]
        rows = [Row.of(state.sampling_params, state.output_token_ids) for state in states]
        window = self._window(any(row.coefficient for row in rows))
        incomplete = self.discard_request_mask.np[: len(rows)].tolist()
        starts = self.query_start_loc.np[: len(rows) + 1].tolist()
        first = self.input_batch.num_computed_tokens_cpu[: len(rows)].tolist()
        tokens = input_ids[: starts[-1]].tolist()
        plan = []
        for place, (row, state) in enumerate(zip(rows, states, strict=True)):
            scheduled = Stretch(row=place, start=first[place], tokens=tokens[starts[place] : starts[place + 1]])
            room = state.sampling_params.max_tokens - len(row.output)
            count = 0 if incomplete[place] else min(window, room)
            plan.append(DraftingRow(row=row, scheduled=scheduled, count=count, ends=_ends(state.sampling_params)))
        return plan if max(row.count for row in plan) > 1 else None

    def _window(self, mixed: bool) -> int:
        """How many tokens the step may give a request."""
        limit = self._speculation.tokens
        # Plain requests keep every draft.
        if not mixed or not self._speculation.adaptive:
            return limit
        return best_window(self.model.shelf.counter.rate(), limit=limit)

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        rows, self._drafting = self._drafting, None
        if rows is None or logits is None:
            return super()._sample(logits, spec_decode_metadata)
        self.model.shelf.deferred = False
        step = DraftStep(self, rows)
        step.draft(logits)
        step.judge(self.model.shelf)
        return _sampler_output(rows)


class SpeculativeCPUWorker(CPUWorker):
    """vLLM's worker with that runner."""

    def init_device(self) -> None:
        """As vLLM's, with another runner."""
        super().init_device()
        self.model_runner = SpeculativeModelRunner(self.vllm_config, self.device)


def _ends(params: "SamplingParams") -> frozenset[int]:
    return frozenset({params.eos_token_id, *(params.stop_token_ids or ())}) - {None}


def _sampler_output(rows: list[DraftingRow]) -> SamplerOutput:
    """Tokens and log-probabilities as vLLM's bookkeeping expects them of a rejection sampler."""
    width = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), max(1, width)), _NO_TOKEN)
    logprobs = torch.zeros(tokens.shape)
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = torch.tensor(row.tokens, dtype=tokens.dtype)
        logprobs[place, : len(row.tokens)] = torch.tensor(row.logprobs)
    return SamplerOutput(
        sampled_token_ids=tokens,
        logprobs_tensors=LogprobsTensors(
            logprob_token_ids=tokens.reshape(-1, 1),
            logprobs=logprobs.reshape(-1, 1),
            # Nobody asks for ranks.
            selected_token_ranks=torch.zeros(tokens.numel(), dtype=tokens.dtype),
        ),
    )
