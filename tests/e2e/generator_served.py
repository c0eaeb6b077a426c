"""Engines with the models that they serve beside them, in transformers, and what they are asked."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_replay import load

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.lora import adapter_parameters, add_adapters
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.weight_publishers import make_publisher
from pilaf_ray.types import GenerationRequest, SampledResponse

Run = Callable[[Coroutine[Any, Any, Any]], Any]

COEFFICIENTS = (0.0, 0.5, -0.5, -1.0, 0.1, 2.0, -0.1, 1.0)
LENGTH = 100
"""Response limit of :class:`Served`."""
MODEL_LENGTH = 387
"""Twelve cache blocks and three tokens: behind a cached prompt of 385 there is room for two tokens."""
CRAMPED_GIB = 36 * (32 * 2 * 2 * 2 * 32 * 4) / 2**30
"""36 cache blocks of 32 tokens; models, layers, K and V, head, fp32."""
ADAPTERS = LoraSettings(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "up_proj"))


def requests_for(coefficients: Sequence[float], *, prompt_length: int, shared: int = 0) -> list[GenerationRequest]:
    """One request a coefficient; prompts are random, their first ``shared`` tokens equal."""
    draw = torch.Generator().manual_seed(prompt_length)
    head = torch.randint(3, 512, (shared,), generator=draw).tolist()
    return [
        GenerationRequest(
            request_id=f"{prompt_length}-{i}",
            prompt_token_ids=(
                *head,
                *torch.randint(3, 512, (prompt_length - shared,), generator=draw).tolist(),
            ),
            coefficient=coefficient,
            seed=1000 * prompt_length + i,
        )
        for i, coefficient in enumerate(coefficients)
    ]


def together(engine: Generator, run: Run, requests: list[GenerationRequest]) -> list[SampledResponse]:
    """In one batch."""

    async def ask() -> list[SampledResponse]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return run(ask())


def with_adapters(folder: Path, lora: LoraSettings, *, seed: int) -> torch.nn.Module:
    """The model in ``folder`` with random adapters beside its weights."""
    network = load(folder)
    add_adapters(network, lora)
    draw = torch.Generator().manual_seed(seed)
    for _, parameter in adapter_parameters(network):
        parameter.data.normal_(std=0.1, generator=draw)
    return network.eval()


def merged_by_peft(network: torch.nn.Module) -> torch.nn.Module:
    """PEFT's own sum, in place."""
    from peft.tuners.lora import LoraLayer

    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    return network


class Served:
    """A cramped engine over tiny Llamas: prompts of some length come in chunks, and some requests are preempted.

    Args:
        root: for the models' folders and published weights.
        shares_base: the policy is the reference with adapters, and one network computes both.
        settings: of the generator.
    """

    def __init__(self, root: Path, run: Run, *, shares_base: bool = False, **settings: Any) -> None:
        policy, reference, new = (make_tiny_llama(root / str(seed), seed=seed) for seed in (0, 1, 2))
        self.run, self.shares_base = run, shares_base
        self.drafts = settings.get("speculation") is not None
        self._folder = reference
        self.policy, self.reference, self.new = (load(folder) for folder in (policy, reference, new))
        self.publisher = make_publisher(transport="filesystem", folder=root / "weights", timeout_seconds=20)
        self.generator = Generator(
            policy_path=str(reference if shares_base else policy),
            reference_path=str(reference),
            dtype="float32",
            max_model_len=MODEL_LENGTH,
            max_new_tokens=LENGTH,
            max_num_seqs=32,
            max_num_batched_tokens=96,
            kv_cache_gib=CRAMPED_GIB,
            shares_base=shares_base,
            **settings,
        )

    @property
    def models(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Policy and reference."""
        return self.policy, self.reference

    def start(self) -> None:
        """Start the engine; one that shares its base gets adapters as from a learner."""
        self.run(self.generator.start())
        if self.shares_base:
            network = with_adapters(self._folder, ADAPTERS, seed=3)
            ticket = self.publisher.publish(1, adapter_parameters(network), adapter_scale=ADAPTERS.scale)
            self.run(self.generator.update_weights(ticket, deadline_seconds=60))
            self.policy = merged_by_peft(network)

    def stop(self) -> None:
        """End the engine."""
        self.run(self.generator.stop())

    def ask(self, requests: list[GenerationRequest]) -> list[SampledResponse]:
        """In one batch."""
        return together(self.generator, self.run, requests)

    def ask_greedily(self, requests: list[GenerationRequest]) -> list[SampledResponse]:
        """In one batch, the likeliest tokens: temperature goes with each request, so the engine can be the same."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.generator, "_temperature", 0.0)
            return self.ask(requests)
