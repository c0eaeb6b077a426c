"""One request to vLLM's engine, as the interpolated model needs it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pilaf_ray.errors import ConfigError, PilafError

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

    from pilaf_ray.engines.mixing_processor import COEFFICIENT_KEY, DRAW_KEY

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
    from pilaf_ray.engines.mixing_processor import COEFFICIENT_KEY

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
