"""Both ends of a weight update for `benchmarks.weight_sync`, each in a process of its own as in a run."""

import asyncio
import statistics
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.workers import Commands
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.weight_publishers import WeightPublisher, make_publisher
from pilaf_ray.engines.weight_tickets import WeightUpdate
from pilaf_ray.types import GenerationRequest, SampledResponse

STEPS_BEFORE = 5
"""Engine steps with tokens before an update begins under load."""


def publish(commands: Commands) -> None:
    """The learner's end: publishes the model's weights or adapters by each transport, or copies them in memory."""
    from pilaf_ray.engines.lora import adapter_parameters, add_adapters
    from pilaf_ray.engines.scoring import load_network

    arguments = commands.arguments
    torch.set_num_threads(arguments["threads"])
    network = load_network(arguments["model_path"], dtype=getattr(torch, arguments["dtype"]))
    whole = sum(p.numel() * p.element_size() for p in network.parameters())
    lora = arguments["lora"] and LoraSettings(**arguments["lora"])
    if lora:
        add_adapters(network, lora)
        network.to(getattr(torch, arguments["dtype"]))
    sent = adapter_parameters(network) if lora else network.named_parameters()
    weights = [(name, parameter.detach()) for name, parameter in sent]
    scale = lora.scale if lora else None
    copies = [torch.zeros_like(tensor) for _, tensor in weights]
    publishers: dict[str, WeightPublisher] = {
        transport: make_publisher(
            transport=transport,
            folder=Path(arguments["folder"]),
            timeout_seconds=arguments["deadline_seconds"],
        )
        for transport in arguments["transports"]
    }
    for command in commands:
        started = time.perf_counter()
        if command["transport"] == "memcpy":
            for copy, (_, tensor) in zip(copies, weights, strict=True):
                copy.copy_(tensor)
            commands.answer({"seconds": time.perf_counter() - started})
        else:
            publisher = publishers[command["transport"]]
            ticket = publisher.publish(command["version"], iter(weights), adapter_scale=scale)
            commands.answer({"seconds": time.perf_counter() - started, "ticket": asdict(ticket), "whole": whole})
    for publisher in publishers.values():
        publisher.close()


class Steps:
    """When the engine gave tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._more = asyncio.Event()

    def note(self) -> None:
        """A step of the engine gave tokens just now."""
        self.times.append(time.perf_counter())
        self._more.set()

    async def wait(self, count: int) -> None:
        """Until there are ``count`` of them."""
        while len(self.times) < count:
            self._more.clear()
            await self._more.wait()


def watched_counter(steps: Steps) -> type[Any]:
    """The generator's own counter of what the engine reports, which tells ``steps`` too."""
    from pilaf_ray.engines.engine_stats import PreemptionCounter

    class Watched(PreemptionCounter):
        def record(self, scheduler_stats: Any, iteration_stats: Any, *more: Any, **named: Any) -> None:
            super().record(scheduler_stats, iteration_stats, *more, **named)
            if iteration_stats is not None and iteration_stats.num_generation_tokens:
                steps.note()

    return Watched


async def generate(commands: Commands) -> None:
    """The generator's end: takes updates, with and without responses under way."""
    from pilaf_ray.engines.generator import Generator

    steps, number = Steps(), 0
    generator = Generator(**commands.arguments["generator"])
    with patch("pilaf_ray.engines.engine_stats.PreemptionCounter", watched_counter(steps)):
        await generator.start()
    try:
        while (command := await asyncio.to_thread(next, commands, None)) is not None:
            ticket = WeightUpdate(**command["ticket"])
            steps.times.clear()
            requests = [
                GenerationRequest(
                    request_id=f"{number}-{row}", prompt_token_ids=tuple(prompt), coefficient=c, seed=number + row
                )
                for row, (prompt, c) in enumerate(command["requests"])
            ]
            number += 1
            commands.answer(await update(generator, steps, ticket, requests, command["deadline_seconds"]))
    finally:
        await generator.stop()


async def update(
    generator: Any, steps: Steps, ticket: WeightUpdate, requests: list[GenerationRequest], deadline_seconds: float
) -> dict[str, Any]:
    """Seconds of the update; and of the stretch without tokens around it, where responses are under way."""
    under_way: list[asyncio.Task[SampledResponse]] = [asyncio.create_task(generator.generate(r)) for r in requests]
    if under_way:
        begun = asyncio.create_task(steps.wait(STEPS_BEFORE))
        await asyncio.wait([begun, asyncio.gather(*under_way)], return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
    started = time.perf_counter()
    await generator.update_weights(ticket, deadline_seconds=deadline_seconds)
    ended = time.perf_counter()
    responses = await asyncio.gather(*under_way)
    usual = [b - a for a, b in pairwise(steps.times) if b <= started or a >= ended]
    # The engine may hand out the tokens of its last step when the update has begun.
    around = [b - a for a, b in pairwise(steps.times) if a < ended and b > started]
    return {
        "seconds": ended - started,
        "without_tokens": max(around, default=None),
        "usual_step": statistics.median(usual) if usual else None,
        "went_on": sum(len({span.version for span in response.versions}) > 1 for response in responses),
    }


def main() -> None:
    """Serve the role that the first line names."""
    commands = Commands()
    if commands.arguments["role"] == "learner":
        publish(commands)
    else:
        asyncio.run(generate(commands))


if __name__ == "__main__":
    main()
