"""One request to vLLM's engine, as the interpolated model needs it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pilaf_ray.engines.token_records import Record
from pilaf_ray.errors import ConfigError, PilafError
from pilaf_ray.types import FinishReason, GenerationRequest, SampledResponse, VersionSpan

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM


def sampling_params(*, coefficient: float, draw: dict[str, Any] | None = None, **options: Any) -> "SamplingParams":
    """vLLM's parameters of one request; where there is a ``draw``, the processor makes it.

    Raises:
        ConfigError: the coefficient is not finite.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from pilaf_ray.engines.row_draws import COEFFICIENT_KEY, DRAW_KEY

    if not math.isfinite(coefficient):
        raise ConfigError(f"a mixing coefficient must be finite, not {coefficient}")
    return SamplingParams(
        # Greedy to vLLM: where there is a draw, the processor makes it.
        temperature=0.0,
        extra_args={COEFFICIENT_KEY: float(coefficient)} | ({DRAW_KEY: draw} if draw else {}),
        output_kind=RequestOutputKind.FINAL_ONLY,
        **options,
    )


async def final_output(
    engine: "AsyncLLM",
    prompt_token_ids: Sequence[int],
    params: "SamplingParams",
    request_id: str,
    *,
    prefix_generation: int,
) -> "RequestOutput":
    """The final output of one request; it shares prefixes with requests of its ``prefix_generation`` only."""
    from pilaf_ray.engines.row_draws import COEFFICIENT_KEY

    final: RequestOutput | None = None
    # Prefixes are shared under one set of weights only; and the blocks of a plain request hold no
    # KV of the reference.
    kind = "mixed" if params.extra_args and params.extra_args[COEFFICIENT_KEY] else "plain"
    salt = f"{kind}-{prefix_generation}"
    prompt: Any = {"prompt_token_ids": list(prompt_token_ids), "cache_salt": salt}
    async for output in engine.generate(prompt, params, request_id):
        final = output
    if final is None:
        raise PilafError(f"request {request_id} ended without an output")
    return final


def sampled_response(request: GenerationRequest, output: "RequestOutput", records: Record | None) -> SampledResponse:
    """What vLLM's final ``output`` says, with ``records`` of a mixed response.

    Raises:
        PilafError: the engine gave the request up.
    """
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise PilafError(f"request {request.request_id} ended early: {completion.finish_reason}")
    tokens = tuple(completion.token_ids)
    positions: Any = completion.logprobs or []
    spans = completion.weight_versions or []
    return SampledResponse(
        token_ids=tokens,
        text=completion.text,
        coefficient=request.coefficient,
        logprobs=tuple(p[t].logprob for p, t in zip(positions, tokens, strict=True)),
        versions=tuple(VersionSpan(version=int(s.version), start=s.start, end=s.end) for s in spans),
        finish_reason=FinishReason(completion.finish_reason),
        policy_logprobs=tuple(policy for policy, _ in records) if records else None,
        reference_logprobs=tuple(reference for _, reference in records) if records else None,
    )
