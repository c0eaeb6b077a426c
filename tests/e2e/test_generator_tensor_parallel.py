"""Two CPU workers share each of the two models: what they draw, and weights that arrive while they draw."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from generator_replay import assert_replayed, load

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.weight_publishers import make_publisher
from pilaf_ray.types import GenerationRequest, SampledResponse


def requests(version: int) -> list[GenerationRequest]:
    """Plain ones, and mixed on either side of the policy."""
    return [
        GenerationRequest(
            request_id=f"{version}-{number}", prompt_token_ids=(5, 6, 7 + number), coefficient=c, seed=40 + number
        )
        for number, c in enumerate((0.0, 0.5, -0.5))
    ]


@pytest.mark.long
async def test_two_workers_draw_what_one_would_and_take_new_weights(tmp_path: Path) -> None:
    folders = [make_tiny_llama(tmp_path / str(seed), seed=seed) for seed in (0, 1, 2)]
    old, reference, new = (load(folder) for folder in folders)
    publisher = make_publisher(transport="gloo", folder=tmp_path / "weights", timeout_seconds=20)
    generator = Generator(
        policy_path=str(folders[0]),
        reference_path=str(folders[1]),
        dtype="float32",
        max_model_len=128,
        max_new_tokens=24,
        max_num_seqs=4,
        kv_cache_gib=0.05,
        tensor_parallel_size=2,
    )

    async def ask(version: int) -> list[SampledResponse]:
        return await asyncio.gather(*(generator.generate(request) for request in requests(version)))

    await generator.start()
    try:
        before = await ask(0)
        ticket = publisher.publish(1, ((n, p) for n, p in new.named_parameters()))
        await generator.update_weights(ticket, deadline_seconds=60)
        after = await ask(1)
    finally:
        publisher.close()
        await generator.stop()
    for version, policy, responses in ((0, old, before), (1, new, after)):
        for request, response in zip(requests(version), responses, strict=True):
            assert_replayed(response, request, [(policy, 24)], reference)
            assert {span.version for span in response.versions} == {version}
            assert (response.policy_logprobs is None) == (request.coefficient == 0)
