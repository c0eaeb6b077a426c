"""New weights reach the policy half of a running engine, and that half only."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from generator_replay import assert_replayed, load, mixed_logprobs

from pilaf_ray.data.tiny_models import make_tiny_llama, make_tiny_qwen2
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.weight_publishers import WeightPublisher, make_publisher
from pilaf_ray.errors import WeightSyncError
from pilaf_ray.types import GenerationRequest, SampledResponse

LENGTH = 300
MODEL_LENGTH = 512

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Served:
    """An engine, its publisher, and the plain models it should agree with."""

    def __init__(
        self, *, make: Callable[..., Path], transport: str, recompute_caches: bool, root: Path, run: Run
    ) -> None:
        self.run, self.root = run, root
        self.recompute_caches = recompute_caches
        folders = [make(root / str(seed), seed=seed) for seed in (0, 1, 2)]
        self.old, self.reference, self.new = (load(folder) for folder in folders)
        self.publisher: WeightPublisher = make_publisher(
            transport=transport, folder=root / "weights", timeout_seconds=20
        )
        self.generator = Generator(
            policy_path=str(folders[0]),
            reference_path=str(folders[1]),
            dtype="float32",
            max_model_len=MODEL_LENGTH,
            max_new_tokens=LENGTH,
            max_num_seqs=8,
            kv_cache_gib=0.05,
            recompute_caches=recompute_caches,
        )

    def publish(self, version: int, model: torch.nn.Module, *, leave_out: str | None = None) -> Any:
        """Publish ``model`` as a learner does: ``named_parameters`` has a tied weight once."""
        parameters = ((n, p) for n, p in model.named_parameters() if n != leave_out)
        return self.publisher.publish(version, parameters)

    def update(self, ticket: Any) -> None:
        self.run(self.generator.update_weights(ticket, deadline_seconds=60))

    def ask(self, *requests: GenerationRequest) -> list[SampledResponse]:
        async def all_of_them() -> list[SampledResponse]:
            return await asyncio.gather(*(self.generator.generate(request) for request in requests))

        return self.run(all_of_them())


@pytest.fixture(
    scope="module",
    params=[(make_tiny_llama, "gloo", True), (make_tiny_qwen2, "shared_memory", False)],
    ids=["tied llama, gloo, caches computed anew", "untied qwen2, shared memory, caches kept"],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    make, transport, recompute_caches = request.param
    loop = asyncio.new_event_loop()
    served = Served(
        make=make,
        transport=transport,
        recompute_caches=recompute_caches,
        root=tmp_path_factory.mktemp("run"),
        run=loop.run_until_complete,
    )
    served.run(served.generator.start())
    yield served
    served.publisher.close()
    served.run(served.generator.stop())
    loop.close()


def short(coefficient: float, *, seed: int = 5) -> GenerationRequest:
    """A long prompt, so that 12 tokens of response fit."""
    draw = torch.Generator().manual_seed(seed)
    prompt = tuple(torch.randint(3, 512, (MODEL_LENGTH - 12,), generator=draw).tolist())
    return GenerationRequest(
        request_id=f"short-{coefficient}-{seed}", prompt_token_ids=prompt, coefficient=coefficient, seed=seed
    )


def check(served: Served, policy: torch.nn.Module, version: int) -> dict[float, SampledResponse]:
    """Every coefficient agrees with ``policy`` and the reference, under ``version``."""
    requests = [short(c) for c in (0.0, -1.0, 0.5)]
    responses = served.ask(*requests)
    for request, response in zip(requests, responses, strict=True):
        assert_replayed(response, request, [(policy, 12)], served.reference)
        assert {span.version for span in response.versions} == {version}
    return {request.coefficient: r for request, r in zip(requests, responses, strict=True)}


def test_update_changes_the_policy_half_only(served: Served) -> None:
    """The prompts are cached before the update: stale cache entries would show."""
    prompt, response = [3, 77, 140], [8, 500, 61, 61]
    references = served.run(served.generator.score(prompt, response, -1.0))
    before = check(served, served.old, 0)
    served.update(served.publish(1, served.new))
    assert served.generator.version == 1
    after = check(served, served.new, 1)
    assert after[0.0].token_ids != before[0.0].token_ids
    assert served.run(served.generator.score(prompt, response, -1.0)) == pytest.approx(references, abs=1e-6)
    scores = served.run(served.generator.score(prompt, response))
    rows = mixed_logprobs(served.new, served.reference, prompt + response, 0.0)[len(prompt) - 1 : -1]
    expected = rows.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)


def test_update_in_flight_splits_the_response_exactly(served: Served) -> None:
    """A response under way has both versions, and each token is that of its version, on fresh or kept caches."""
    served.update(served.publish(2, served.old))
    ticket = served.publish(3, served.new)
    longs = [
        GenerationRequest(request_id=f"long-{i}", prompt_token_ids=(5, 6, 7 + i), coefficient=0.3, seed=40 + i)
        for i in range(3)
    ]

    async def scenario() -> list[SampledResponse]:
        under_way = [asyncio.create_task(served.generator.generate(request)) for request in longs]
        await served.generator.generate(short(0.0))
        await served.generator.update_weights(ticket, deadline_seconds=60)
        return await asyncio.gather(*under_way)

    split = 0
    for request, response in zip(longs, served.run(scenario()), strict=True):
        models = {2: served.old, 3: served.new}
        stages = [(models[span.version], span.end) for span in response.versions]
        assert_replayed(response, request, stages, served.reference, kept_caches=not served.recompute_caches)
        assert response.versions[-1].end == len(response.token_ids)
        split += len(response.versions) == 2
    assert split >= 1


def test_the_engine_samples_while_new_weights_are_on_their_way(served: Served) -> None:
    """The list of files is a pipe, which the engine can read to its end when this test has written it."""
    served.update(served.publish(3, served.old))
    slow = make_publisher(transport="filesystem", folder=served.root / "slow", timeout_seconds=20)
    ticket = slow.publish(4, served.new.named_parameters())
    listed = Path(ticket.location) / "shards.json"
    shards = listed.read_text()
    listed.unlink()
    os.mkfifo(listed)

    async def scenario() -> SampledResponse:
        update = asyncio.create_task(served.generator.update_weights(ticket, deadline_seconds=60))
        # Opening returns when the engine has begun to read.
        pipe = await asyncio.to_thread(listed.open, "w")
        response = await served.generator.generate(short(0.5))
        assert not update.done()
        with pipe:
            pipe.write(shards)
        await update
        return response

    response = served.run(scenario())
    assert_replayed(response, short(0.5), [(served.old, 12)], served.reference)
    assert {span.version for span in response.versions} == {3}
    assert served.generator.version == 4
    check(served, served.new, 4)


def test_damaged_update_leaves_the_old_weights(served: Served) -> None:
    served.update(served.publish(4, served.new))
    ticket = replace(served.publish(5, served.old), sample_checksum="0" * 64)
    with pytest.raises(WeightSyncError, match=r"version 5 failed in phase 'receive'.*not what was published"):
        served.update(ticket)
    assert served.generator.version == 4
    check(served, served.new, 4)


def test_incomplete_update_is_refused_and_a_full_one_recovers(served: Served) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(WeightSyncError, match=r"failed in phase 'load'.*lacks 1 of"):
        served.update(served.publish(6, served.old, leave_out=name))
    served.update(served.publish(7, served.old))
    check(served, served.old, 7)


def test_foreign_transport_is_refused(served: Served) -> None:
    ticket = replace(served.publish(8, served.old), transport="pigeon")
    with pytest.raises(WeightSyncError, match="published by 'pigeon'"):
        served.update(ticket)
