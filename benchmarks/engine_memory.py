"""Does an engine grow with what it does? `python -m benchmarks.engine_memory --rounds 2500 [--updates]`.

One engine on the tiny model is given rounds of requests with prompts of all lengths, as many in each as a run has
under way, and with ``--updates`` new weights after each. Its own memory is read now and again. What it keeps for every
shape of a matrix product that it has met levels off once all have been met; what it kept of a request or an
update would not. A key-value cache that is small beside the requests has been touched everywhere soon.
"""

import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console

from benchmarks.chaos_job import ROOT
from benchmarks.machine import machine
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.scoring import load_network
from pilaf_ray.engines.weight_publishers import make_publisher
from pilaf_ray.types import GenerationRequest

MODEL = ROOT / ".cache/models/tiny/policy"
REQUESTS = 8
READINGS = 20
COEFFICIENTS = (0.0, 0.0, 0.5, -0.5)


def make_requests(draw: random.Random, number: int) -> list[GenerationRequest]:
    """Half plain, half mixed, with prompts of 20 to 79 tokens."""
    return [
        GenerationRequest(
            request_id=f"{number}-{place}",
            prompt_token_ids=tuple(draw.randrange(3, 512) for _ in range(draw.randrange(20, 80))),
            coefficient=COEFFICIENTS[place % len(COEFFICIENTS)],
            seed=REQUESTS * number + place,
        )
        for place in range(REQUESTS)
    ]


async def measure(rounds: int, *, updates: bool, folder: Path, console: Console) -> list[dict[str, float]]:
    """The engine's unique memory after every twentieth part of the rounds."""
    generator = Generator(
        policy_path=str(MODEL), reference_path=str(MODEL), dtype="float32", max_model_len=96, max_new_tokens=12,
        kv_cache_gib=0.03,
    )  # fmt: skip
    await generator.start()
    children = psutil.Process().children(recursive=True)
    engine = max(children, key=lambda child: child.memory_info().rss)
    publisher = make_publisher(transport="filesystem", folder=folder, timeout_seconds=60)
    network, draw, started = load_network(str(MODEL), dtype=torch.float32), random.Random(0), time.monotonic()
    readings = []
    for number in range(1, rounds + 1):
        await asyncio.gather(*(generator.generate(request) for request in make_requests(draw, number)))
        if updates:
            ticket = publisher.publish(number, network.named_parameters())
            await generator.update_weights(ticket, deadline_seconds=60)
        else:
            generator.forget_prefixes()
        if number % max(1, rounds // READINGS) == 0:
            mib = engine.memory_full_info().uss / 2**20
            readings.append({"rounds": number, "seconds": time.monotonic() - started, "mib": mib})
            console.print(f"{number} rounds, {readings[-1]['seconds']:.0f} s: {mib:.1f} MiB", highlight=False)
    publisher.close()
    await generator.stop()
    return readings


def main(
    rounds: Annotated[int, typer.Option(min=1, help=f"Of {REQUESTS} requests each.")] = 2500,
    updates: Annotated[bool, typer.Option(help="New weights after each round.")] = False,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print each reading and one line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        readings = asyncio.run(measure(rounds, updates=updates, folder=Path(folder), console=Console(stderr=True)))
    result = {"machine": machine(), "updates": updates, "requests_a_round": REQUESTS, "readings": readings}
    print(json.dumps(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
