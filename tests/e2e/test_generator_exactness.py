"""One engine decodes exactly from the mixture of two models, whatever its scheduler does."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from generator_replay import END, assert_records, assert_replayed, chi_square_z, load, mixed_logprobs
from generator_served import COEFFICIENTS, CRAMPED_GIB, LENGTH, Run, requests_for, together
from reference_rows import ALLOW, reference_rows

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.generator import Generator
from pilaf_ray.errors import PromptError
from pilaf_ray.types import FinishReason, GenerationRequest, SampledResponse

MODEL_LENGTH = 386
"""Twelve cache blocks and two tokens: behind a cached prompt of 385 there is room for one token."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return make_tiny_llama(root / "policy", seed=0), make_tiny_llama(root / "reference", seed=1)


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> tuple[torch.nn.Module, torch.nn.Module]:
    return load(folders[0]), load(folders[1])


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """The engine belongs to one event loop, so all tests of the module share it."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where PyTorch keeps what it compiles."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def engine(folders: tuple[Path, Path], run: Run, compiled: Path) -> Iterator[Generator]:
    """Cramped on purpose: 36 cache blocks of 32 tokens; a prompt of 200 tokens comes in three chunks."""
    generator = Generator(
        policy_path=str(folders[0]),
        reference_path=str(folders[1]),
        dtype="float32",
        max_model_len=MODEL_LENGTH,
        max_new_tokens=LENGTH,
        max_num_seqs=32,
        max_num_batched_tokens=96,
        kv_cache_gib=CRAMPED_GIB,
        initial_version=7,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ALLOW | {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}).items():
            patch.setenv(name, value)
        run(generator.start())
        yield generator
        run(generator.stop())


@pytest.mark.parametrize(("prompt_length", "shared"), [(5, 0), (200, 160)], ids=["short", "shared prefix, preempted"])
def test_eight_coefficients_in_one_batch(
    engine: Generator, run: Run, models: Any, prompt_length: int, shared: int
) -> None:
    """The long prompts need up to 50 blocks, shared ones counted once, and find 36: requests are preempted."""
    requests = requests_for(COEFFICIENTS, prompt_length=prompt_length, shared=shared)
    before = engine.preemptions
    responses = together(engine, run, requests)
    assert (engine.preemptions > before) == bool(shared)
    for request, response in zip(requests, responses, strict=True):
        assert_replayed(response, request, [(models[0], LENGTH)], models[1])
        assert response.coefficient == request.coefficient
        assert_records(response, request, models)
        assert [(s.version, s.start, s.end) for s in response.versions] == [(7, 0, len(response.token_ids))]
        stopped = response.token_ids[-1] == END
        assert response.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


def test_plain_requests_cost_the_reference_no_rows(engine: Generator, run: Run) -> None:
    """And mixed ones beside them cost it their own alone: each token but the last."""
    start = run(reference_rows(engine))
    together(engine, run, requests_for([0.0] * 4, prompt_length=11))
    assert run(reference_rows(engine)) == start
    requests = requests_for([0.0, 0.5, 0.0, -1.0], prompt_length=12)
    responses = together(engine, run, requests)
    tokens = sum(12 + len(response.token_ids) - 1 for response in responses if response.coefficient)
    assert run(reference_rows(engine)) - start == tokens


def test_next_token_distribution(engine: Generator, run: Run, models: Any) -> None:
    """Chi-square of seeded draws against the exact mixture, for the coefficients that the samplers use."""
    draws = {0.5: 10_000, 0.0: 3_000, -0.5: 3_000, -1.0: 3_000}
    prompt = requests_for([0.5], prompt_length=MODEL_LENGTH - 1)[0].prompt_token_ids
    requests = [
        GenerationRequest(request_id=f"chi-{c}-{i}", prompt_token_ids=prompt, coefficient=c, seed=i)
        for c, count in draws.items()
        for i in range(count)
    ]
    random.Random(0).shuffle(requests)  # so that the coefficients share batches
    counts = {c: torch.zeros(512, dtype=torch.float64) for c in draws}
    for request, response in zip(requests, together(engine, run, requests), strict=True):
        assert len(response.token_ids) == 1
        counts[request.coefficient][response.token_ids[0]] += 1
    for c, count in draws.items():
        assert chi_square_z(counts[c], mixed_logprobs(*models, prompt, c)[-1].exp().double()) < 3.1, c  # p > 0.001
        assert counts[c].sum() == count


@pytest.mark.parametrize("coefficient", [0.0, 0.5, -1.0])
def test_score_is_the_exact_logprob(engine: Generator, run: Run, models: Any, coefficient: float) -> None:
    prompt, response = [11, 200, 33], [42, 7, 501, 3, 99]
    scores = run(engine.score(prompt, response, coefficient))
    rows = mixed_logprobs(*models, prompt + response, coefficient)[len(prompt) - 1 : -1]
    expected = rows.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)


def test_score_beside_mixed_requests(engine: Generator, run: Run, models: Any) -> None:
    """Prompt log-probabilities of one request, while the others of its batch are mixed."""
    requests = requests_for([0.5, -0.5, 1.0, 0.0, 2.0], prompt_length=9)
    prompt, response = [11, 200], [42, 7, 501]

    async def scenario() -> tuple[list[SampledResponse], list[list[float]]]:
        under_way = [asyncio.create_task(engine.generate(request)) for request in requests]
        scores = [await engine.score(prompt, response) for _ in range(10)]
        assert not all(task.done() for task in under_way)
        return await asyncio.gather(*under_way), scores

    responses, scores = run(scenario())
    for request, given in zip(requests, responses, strict=True):
        assert_replayed(given, request, [(models[0], LENGTH)], models[1])
    rows = mixed_logprobs(*models, prompt + response, 0.0)[len(prompt) - 1 : -1]
    expected = rows.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    for found in scores:
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


def test_prompt_without_room_is_refused(engine: Generator, run: Run) -> None:
    request = GenerationRequest(request_id="x", prompt_token_ids=(5,) * 386, coefficient=0.0, seed=0)
    with pytest.raises(PromptError, match="386 tokens does not fit max_model_len=386"):
        run(engine.generate(request))


def test_usage_counts_engine_processes(engine: Generator, run: Run) -> None:
    together(engine, run, requests_for([0.0], prompt_length=6))
    usage = engine.usage()
    assert usage.role == "generator"
    assert usage.busy_seconds > 0
    assert usage.peak_memory_mib > 300


def test_masked_tokens_stay_masked_without_nan() -> None:
    """Hand-made rows; c = -1 would give 0 * inf, c = 0 is the policy bit for bit."""
    from pilaf_ray.engines.row_draws import mix_logits

    inf = float("inf")
    policy = torch.tensor([[1.0, -inf, 3.0]] * 3)
    reference = torch.tensor([[2.0, 5.0, -inf]] * 3)
    mixed = mix_logits(policy, reference, torch.tensor([-1.0, 0.5, 0.0]))
    assert mixed.tolist() == [[2.0, -inf, -inf], [0.5, -inf, -inf], [1.0, -inf, 3.0]]


def test_an_eager_engine_compiles_nothing(engine: Generator, run: Run, compiled: Path) -> None:
    run(engine.generate(requests_for([0.5], prompt_length=8)[0]))
    assert not list(compiled.rglob("*"))
