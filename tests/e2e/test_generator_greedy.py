"""Greedy decoding from eight mixtures at once, on an architecture that shares nothing with Llama."""

import asyncio
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from generator_replay import assert_likeliest, load
from generator_served import COEFFICIENTS

from pilaf_ray.data.tiny_models import make_tiny_gpt2
from pilaf_ray.engines.generator import Generator
from pilaf_ray.types import GenerationRequest, SampledResponse

LENGTH = 40


async def decode(policy: Path, reference: Path, requests: list[GenerationRequest]) -> list[SampledResponse]:
    generator = Generator(
        policy_path=str(policy),
        reference_path=str(reference),
        dtype="float32",
        max_model_len=128,
        max_new_tokens=LENGTH,
        temperature=0.0,
        kv_cache_gib=0.05,
    )
    await generator.start()
    try:
        return await asyncio.gather(*(generator.generate(request) for request in requests))
    finally:
        await generator.stop()


def test_eight_coefficients_equal_two_models_mixed_by_hand(tmp_path: Path) -> None:
    policy, reference = make_tiny_gpt2(tmp_path / "policy", seed=0), make_tiny_gpt2(tmp_path / "reference", seed=1)
    draw = torch.Generator().manual_seed(0)
    requests = [
        GenerationRequest(
            request_id=str(i),
            prompt_token_ids=tuple(torch.randint(3, 512, (8 + i,), generator=draw).tolist()),
            coefficient=c,
            seed=i,
        )
        for i, c in enumerate(COEFFICIENTS)
    ]
    responses = asyncio.run(decode(policy, reference, requests))
    models = load(policy), load(reference)
    answers = set()
    for request, response in zip(requests, responses, strict=True):
        assert_likeliest(response, request, models, length=LENGTH)
        answers.add(response.token_ids)
    assert len(answers) == len(COEFFICIENTS)
