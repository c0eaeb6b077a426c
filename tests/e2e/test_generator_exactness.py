"""One engine decodes exactly from the mixture of two models, whatever its scheduler does."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from generator_replay import END, assert_replayed, load, mixed_logprobs, next_logits

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.generator import Generator
from pilaf_ray.errors import PromptError
from pilaf_ray.types import FinishReason, GenerationRequest, SampledResponse

LENGTH = 100
"""Response limit of the engine under test."""
MODEL_LENGTH = 386
"""Twelve cache blocks and two tokens: behind a cached prompt of 385 there is room for one token."""

Run = Callable[[Coroutine[Any, Any, Any]], Any]


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
    block_bytes = 32 * 2 * 2 * 2 * 32 * 4  # tokens, models, layers, K and V, head, fp32
    generator = Generator(
        policy_path=str(folders[0]),
        reference_path=str(folders[1]),
        dtype="float32",
        max_model_len=MODEL_LENGTH,
        max_new_tokens=LENGTH,
        max_num_seqs=32,
        max_num_batched_tokens=96,
        kv_cache_gib=36 * block_bytes / 2**30,
        initial_version=7,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        run(generator.start())
        yield generator
        run(generator.stop())


def requests_for(coefficients: list[float], *, prompt_length: int, shared: int = 0) -> list[GenerationRequest]:
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
    async def ask() -> list[SampledResponse]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return run(ask())


@pytest.mark.parametrize(("prompt_length", "shared"), [(5, 0), (200, 160)], ids=["short", "shared prefix, preempted"])
def test_eight_coefficients_in_one_batch(
    engine: Generator, run: Run, models: Any, prompt_length: int, shared: int
) -> None:
    """The long prompts need up to 50 blocks, shared ones counted once, and find 36: requests are preempted."""
    coefficients = [0.0, 0.5, -0.5, -1.0, 0.1, 2.0, -0.1, 1.0]
    requests = requests_for(coefficients, prompt_length=prompt_length, shared=shared)
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


def assert_records(response: SampledResponse, request: GenerationRequest, models: Any) -> None:
    """Mixed responses say what each network alone gave their tokens."""
    if not request.coefficient:
        assert response.policy_logprobs is response.reference_logprobs is None
        return
    first = len(request.prompt_token_ids)
    tokens = [*request.prompt_token_ids, *response.token_ids]
    places = torch.tensor(response.token_ids).unsqueeze(1)
    for model, found in zip(models, (response.policy_logprobs, response.reference_logprobs), strict=True):
        expected = next_logits(model, tokens)[first - 1 : -1].log_softmax(-1).gather(1, places).squeeze(1)
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)


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


def chi_square_z(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standard normal deviate of Pearson's statistic, by Wilson and Hilferty's cube root; rare tokens count as one."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum().view(1)])
    expected = torch.cat([expected[common], expected[~common].sum().view(1)])
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = len(observed) - 1
    assert degrees > 30
    spread = 2 / (9 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5)


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
