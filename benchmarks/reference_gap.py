"""How far the engine's log π_ref is from the reference's: `python -m benchmarks.reference_gap configs/quickstart.yaml`.

With `reference.reuse_sampled` the loss takes log π_ref of mixed responses from the engine that sampled them, and those
of plain ones from the reference model: two implementations of one network. Mixed responses are sampled as a run
samples them, and the reference scores the same tokens.
"""

import asyncio
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.machine import machine
from pilaf_ray.build import build_inputs, generator_arguments, reference_arguments
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.types import GenerationRequest, SampledResponse


async def sample(config: RunConfig, requests: Sequence[GenerationRequest]) -> list[SampledResponse]:
    """Responses of the run's own engine."""
    from pilaf_ray.engines.generator import Generator

    generator = Generator(**generator_arguments(config, build_inputs(config)))
    await generator.start()
    try:
        return list(await asyncio.gather(*(generator.generate(request) for request in requests)))
    finally:
        await generator.stop()


def gaps(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and largest |difference| of a token and of a response's sum, in nats."""
    tokens = [abs(a - b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
    sums = [abs(sum(mine) - sum(other)) for mine, other in zip(ours, theirs, strict=True)]
    return {
        "responses": len(sums),
        "tokens": len(tokens),
        "token_mean": statistics.fmean(tokens),
        "token_largest": max(tokens),
        "response_mean": statistics.fmean(sums),
        "response_largest": max(sums),
    }


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    pairs: Annotated[int, typer.Option(min=1)] = 16,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print the differences and one line of JSON."""
    from pilaf_ray.engines.reference import ReferenceModel

    config = load_config(config_path, overrides or [])
    inputs = build_inputs(config)
    beta = config.algorithm.beta
    requests = [
        GenerationRequest(
            request_id=f"{number}{sign:+d}",
            prompt_token_ids=prompt.token_ids,
            coefficient=sign * beta,
            seed=2 * number + (sign > 0),
        )
        for number, prompt in enumerate(list(inputs.train.prompts)[:pairs])
        for sign in (1, -1)
    ]
    responses = asyncio.run(sample(config, requests))
    reference = ReferenceModel(**reference_arguments(config, inputs))
    items = [(q.prompt_token_ids, r.token_ids) for q, r in zip(requests, responses, strict=True)]
    scored = reference.score_tokens(items)
    found = gaps([response.reference_logprobs or () for response in responses], scored)
    Console(stderr=True).print(", ".join(f"{key} {value:.3g}" for key, value in found.items()), highlight=False)
    result = {"machine": machine(), "overrides": overrides or [], "dtype": inputs.dtype, **found}
    print(json.dumps(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
