"""What a PILAF pair costs to sample: `python -m benchmarks.generation configs/quickstart.yaml [key=value …]`.

One engine, the run's own generator settings, the same prompts and seeds for every sampler; each sampler is
timed several times in turn, so that a slow moment of the machine falls on all of them. The prefix cache is
cold at every repetition, as it is after a weight update.
"""

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from pilaf_ray.build import build_inputs, generator_arguments
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.generator import Generator
from pilaf_ray.types import GenerationRequest, Prompt


def requests(prompts: list[Prompt], *, sampler: str, beta: float, round_number: int) -> list[GenerationRequest]:
    """Both sides of a pair a prompt; PILAF's coin is replaced by turns, so that exactly half are mixed."""
    found = []
    for number, prompt in enumerate(prompts):
        mixed = sampler == "hybrid" or (sampler == "pilaf" and number % 2 == 1)
        # Hybrid mixes one side only.
        sides = (("a", beta if mixed else 0.0), ("b", -beta if mixed and sampler == "pilaf" else 0.0))
        found += [
            GenerationRequest(
                request_id=f"{sampler}-{round_number}-{number}-{side}",
                prompt_token_ids=prompt.token_ids,
                coefficient=coefficient,
                seed=2 * number + (side == "b"),
            )
            for side, coefficient in sides
        ]
    return found


async def measure(config: RunConfig, *, pairs: int, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Seconds and tokens of each repetition, by sampler; the first, untimed round warms the engine up."""
    inputs = build_inputs(config)
    generator = Generator(**generator_arguments(config, inputs))
    await generator.start()
    results: dict[str, list[dict[str, float]]] = {"vanilla": [], "hybrid": [], "pilaf": []}
    try:
        for number in range(repetitions + 1):
            for sampler, runs in results.items():
                prompts = list(inputs.train.prompts[number * pairs : (number + 1) * pairs])
                wanted = requests(prompts, sampler=sampler, beta=config.algorithm.beta, round_number=number)
                generator.forget_prefixes()
                started = time.perf_counter()
                responses = await asyncio.gather(*(generator.generate(request) for request in wanted))
                seconds = time.perf_counter() - started
                if number > 0:
                    runs.append({"seconds": seconds, "tokens": sum(len(r.token_ids) for r in responses)})
    finally:
        await generator.stop()
    return results


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    pairs: int = 16,
    repetitions: int = 3,
) -> None:
    """Print a table and one line of JSON."""
    config = load_config(config_path, overrides or [])
    results = asyncio.run(measure(config, pairs=pairs, repetitions=repetitions))
    table = Table("sampler", "tokens/s", "pairs/s", "pairs/s over vanilla", "spread")
    rates = {name: [pairs / run["seconds"] for run in runs] for name, runs in results.items()}
    vanilla = statistics.median(rates["vanilla"])
    rows = []
    for name, runs in results.items():
        rate = statistics.median(rates[name])
        row = {
            "sampler": name,
            "tokens_per_second": statistics.median(run["tokens"] / run["seconds"] for run in runs),
            "pairs_per_second": rate,
            "over_vanilla": rate / vanilla,
            "spread": (max(rates[name]) - min(rates[name])) / rate,
        }
        rows.append(row)
        table.add_row(name, *(f"{row[key]:.3g}" for key in list(row)[1:]))
    Console(stderr=True).print(table)
    print(json.dumps({"machine": machine(), "pairs": pairs, "repetitions": repetitions, "results": rows}))


if __name__ == "__main__":
    typer.run(main)
