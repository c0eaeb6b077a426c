"""Adapters reach a running engine: its policy half is the merged model, its reference half stays, little is sent."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from generator_replay import assert_replayed, load, mixed_logprobs
from generator_served import merged_by_peft, with_adapters

from pilaf_ray.data.tiny_models import make_tiny_llama, make_tiny_qwen2
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.lora import adapter_parameters
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.engines.weight_publishers import WeightPublisher, make_publisher
from pilaf_ray.engines.weight_tickets import WeightUpdate
from pilaf_ray.errors import WeightSyncError
from pilaf_ray.types import GenerationRequest, SampledResponse

PROMPT, RESPONSE = [3, 77, 140], [8, 500, 61, 61]


class Adapted:
    """An engine that starts as its reference, a model with adapters, and what both should be, in transformers."""

    def __init__(
        self,
        *,
        make: Callable[..., Path],
        transport: str,
        lora: LoraSettings,
        root: Path,
        dtype: str = "float32",
        **settings: Any,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self.lora = lora
        self.folder = make(root / "base", seed=0)
        self.base = load(self.folder)
        self.publisher: WeightPublisher = make_publisher(
            transport=transport, folder=root / "weights", timeout_seconds=20
        )
        self.generator = Generator(
            policy_path=str(self.folder),
            reference_path=str(self.folder),
            dtype=dtype,
            max_model_len=256,
            max_new_tokens=8,
            max_num_seqs=8,
            kv_cache_gib=0.05,
            **settings,
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    async def together(self, requests: list[GenerationRequest]) -> list[SampledResponse]:
        """In one batch."""
        return await asyncio.gather(*(self.generator.generate(request) for request in requests))

    def adapted(self, seed: int) -> torch.nn.Module:
        """The base with random adapters."""
        return with_adapters(self.folder, self.lora, seed=seed)

    def update(self, version: int, network: torch.nn.Module) -> WeightUpdate:
        """Publish as a learner does, and have the engine take it."""
        ticket = self.publisher.publish(version, adapter_parameters(network), adapter_scale=self.lora.scale)
        self.run(self.generator.update_weights(ticket, deadline_seconds=60))
        return ticket

    def close(self) -> None:
        self.publisher.close()
        self.run(self.generator.stop())
        self._loop.close()


CASES = {
    "tied llama, gloo, part of the fused projections": (
        make_tiny_llama,
        "gloo",
        LoraSettings(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "up_proj")),
        {},
    ),
    "untied qwen2, filesystem, all linear layers": (
        make_tiny_qwen2,
        "filesystem",
        LoraSettings(rank=2, alpha=2.0, dropout=0.0, targets="all-linear"),
        {},
    ),
    "one base, tied llama, gloo, part of the fused projections": (
        make_tiny_llama,
        "gloo",
        LoraSettings(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "up_proj")),
        {"shares_base": True},
    ),
    "one base, untied qwen2, filesystem, all linear layers, drafting ahead": (
        make_tiny_qwen2,
        "filesystem",
        LoraSettings(rank=2, alpha=2.0, dropout=0.0, targets="all-linear"),
        {"shares_base": True, "speculation": Speculation(tokens=4, adaptive=False)},
    ),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    make, transport, lora, settings = request.param
    adapted = Adapted(make=make, transport=transport, lora=lora, root=tmp_path_factory.mktemp("run"), **settings)
    adapted.run(adapted.generator.start())
    yield adapted
    adapted.close()


def check(adapted: Adapted, policy: torch.nn.Module, version: int) -> None:
    """Scores, and samples of plain, reference and mixed requests, token by token."""
    scores = adapted.run(adapted.generator.score(PROMPT, RESPONSE))
    rows = mixed_logprobs(policy, adapted.base, PROMPT + RESPONSE, 0.0)[len(PROMPT) - 1 : -1]
    expected = rows.gather(1, torch.tensor(RESPONSE).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)
    asked = ((0.0, (5, 6, 7)), (-1.0, (5, 6, 7)), (0.5, (9, 8)), (0.0, (4,)), (-1.5, (1, 2, 3, 4)))
    requests = [
        GenerationRequest(
            request_id=f"{version}-{coefficient}", prompt_token_ids=prompt, coefficient=coefficient, seed=11
        )
        for coefficient, prompt in asked
    ]
    for request, response in zip(requests, adapted.run(adapted.together(requests)), strict=True):
        assert_replayed(response, request, [(policy, 8)], adapted.base)
        assert {span.version for span in response.versions} == {version}


def test_each_update_is_added_to_the_reference_and_not_to_the_one_before(adapted: Adapted) -> None:
    check(adapted, adapted.base, 0)
    for version in (1, 2):
        network = adapted.adapted(seed=version)
        adapted.update(version, network)
        check(adapted, merged_by_peft(network), version)


def test_the_bytes_of_an_update_shrink_by_what_the_adapters_are_smaller(adapted: Adapted) -> None:
    network = adapted.adapted(seed=3)
    ticket = adapted.update(3, network)
    layers = [m for n, m in adapted.base.named_modules() if n.endswith(tuple(_targets(adapted.lora)))]
    adapters = sum(adapted.lora.rank * (m.in_features + m.out_features) for m in layers)
    whole = sum(p.numel() for p in adapted.base.parameters())
    assert ticket.num_bytes == 4 * adapters
    print(f"an update moves {ticket.num_bytes} bytes of {4 * whole}: 1/{whole / adapters:.1f}")


def _targets(lora: LoraSettings) -> tuple[str, ...]:
    if lora.targets != "all-linear":
        return lora.targets
    return ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_adapters_of_another_model_are_refused_and_right_ones_recover(adapted: Adapted) -> None:
    network = adapted.adapted(seed=4)
    unknown = ((name.replace("layers.1", "layers.7"), p) for name, p in adapter_parameters(network))
    refuse(adapted, unknown, r"failed in phase 'load'.*adapter tensors fit no weight of the reference")
    narrower = ((name, p[:, :-1] if "lora_A" in name else p) for name, p in adapter_parameters(network))
    refuse(adapted, narrower, r"failed in phase 'load'.*(has|have the) sizes")
    adapted.update(5, network)
    check(adapted, merged_by_peft(network), 5)


@pytest.mark.long
def test_adapters_of_a_float32_learner_reach_a_shared_base_in_bfloat16(tmp_path: Path) -> None:
    lora = LoraSettings(rank=2, alpha=2.0, dropout=0.0, targets="all-linear")
    settings: dict[str, Any] = {"dtype": "bfloat16", "shares_base": True}
    adapted = Adapted(make=make_tiny_qwen2, transport="filesystem", lora=lora, root=tmp_path, **settings)
    adapted.run(adapted.generator.start())
    network = adapted.adapted(seed=1)
    adapted.update(1, network)
    scores = torch.tensor(adapted.run(adapted.generator.score(PROMPT, RESPONSE)))
    expected, before = (
        mixed_logprobs(model, adapted.base, PROMPT + RESPONSE, 0.0)[len(PROMPT) - 1 : -1]
        .gather(1, torch.tensor(RESPONSE).unsqueeze(1))
        .squeeze(1)
        for model in (merged_by_peft(network), adapted.base)
    )
    torch.testing.assert_close(scores, expected, atol=0.1, rtol=0.02)
    assert (expected - before).abs().max() > 0.5, "the adapters are seen"
    adapted.close()


def refuse(adapted: Adapted, parameters: Iterable[tuple[str, torch.Tensor]], why: str) -> None:
    ticket = adapted.publisher.publish(4, parameters, adapter_scale=1.0)
    with pytest.raises(WeightSyncError, match=why):
        adapted.run(adapted.generator.update_weights(ticket, deadline_seconds=60))
