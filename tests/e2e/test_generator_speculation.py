"""An engine that drafts ahead gives the tokens of one that does not, and their log-probabilities."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from generator_replay import END, assert_replayed, load, mixed_logprobs
from test_generator_exactness import assert_records, chi_square_z, requests_for, together

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.engines.weight_publishers import make_publisher
from pilaf_ray.types import GenerationRequest, SampledResponse

LENGTH = 100
MODEL_LENGTH = 387
"""Twelve cache blocks and three tokens: behind a cached prompt of 385 there is room for two tokens."""
Run = Callable[[Coroutine[Any, Any, Any]], Any]
COEFFICIENTS = [0.0, 0.5, -0.5, -1.0, 0.1, 2.0, -0.1, 1.0]

DRAFTS = Speculation(tokens=5, adaptive=False)


class Served:
    """A cramped engine (36 cache blocks of 32 tokens) that drafts five tokens ahead, and the models that it serves."""

    def __init__(
        self, root: Path, run: Run, *, temperature: float = 1.0, top_p: float = 1.0,
        speculation: Speculation | None = DRAFTS,
    ) -> None:  # fmt: skip
        folders = [make_tiny_llama(root / str(seed), seed=seed) for seed in (0, 1, 2)]
        self.policy, self.reference, self.new = (load(folder) for folder in folders)
        self.publisher = make_publisher(transport="filesystem", folder=root / "weights", timeout_seconds=20)
        self.run = run
        block_bytes = 32 * 2 * 2 * 2 * 32 * 4  # tokens, models, layers, K and V, head, fp32
        self.generator = Generator(
            policy_path=str(folders[0]),
            reference_path=str(folders[1]),
            dtype="float32",
            max_model_len=MODEL_LENGTH,
            max_new_tokens=LENGTH,
            max_num_seqs=32,
            max_num_batched_tokens=96,
            kv_cache_gib=36 * block_bytes / 2**30,
            temperature=temperature,
            top_p=top_p,
            speculation=speculation,
        )

    def ask(self, requests: list[GenerationRequest]) -> list[SampledResponse]:
        return together(self.generator, self.run, requests)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("run"), run)
    run(served.generator.start())
    yield served
    run(served.generator.stop())


@pytest.mark.parametrize(("prompt_length", "shared"), [(5, 0), (200, 160)], ids=["short", "shared prefix, preempted"])
def test_eight_coefficients_in_one_batch(served: Served, prompt_length: int, shared: int) -> None:
    """Tokens by the documented rule, log-probabilities of mixture, policy and reference by hand."""
    requests = requests_for(COEFFICIENTS, prompt_length=prompt_length, shared=shared)
    before, counts = served.generator.preemptions, served.run(served.generator.draft_counts())
    responses = served.ask(requests)
    assert (served.generator.preemptions > before) == bool(shared)
    for request, response in zip(requests, responses, strict=True):
        assert_replayed(response, request, [(served.policy, LENGTH)], served.reference)
        assert_records(response, request, (served.policy, served.reference))
        assert (response.finish_reason == "stop") == (response.token_ids[-1] == END)
    after = served.run(served.generator.draft_counts())
    mixed = sum(len(r.token_ids) for r in responses if r.coefficient)
    # What is computed again after a preemption is already drawn, so each token is judged once.
    assert after.judged - counts.judged == mixed
    assert after.kept - counts.kept < mixed < after.drafted - counts.drafted
    assert after.passes - counts.passes < mixed


def test_next_token_distribution(served: Served) -> None:
    """Chi-square of second tokens, which are drafts ahead, against their exact mixture; coefficients share batches."""
    draws = {0.5: 3_000, -0.5: 2_500, -1.0: 2_500, 0.0: 2_500}
    prompt = requests_for([0.5], prompt_length=MODEL_LENGTH - 2)[0].prompt_token_ids
    requests = [
        GenerationRequest(request_id=f"chi-{c}-{i}", prompt_token_ids=prompt, coefficient=c, seed=i)
        for c, count in draws.items()
        for i in range(count)
    ]
    random.Random(0).shuffle(requests)
    pairs: dict[float, list[tuple[int, ...]]] = {c: [] for c in draws}
    for request, response in zip(requests, served.ask(requests), strict=True):
        pairs[request.coefficient].append(response.token_ids)
    for c, found in pairs.items():
        first = mixed_logprobs(served.policy, served.reference, prompt, c)[-1].double().exp()
        expected = second_token(served, prompt, c, first)
        counts = torch.bincount(torch.tensor([p[1] for p in found if len(p) == 2]), minlength=512).double()
        assert chi_square_z(counts, expected / expected.sum()) < 3.1, c  # p > 0.001


@torch.no_grad()
def second_token(served: Served, prompt: tuple[int, ...], c: float, first: torch.Tensor) -> torch.Tensor:
    """Probability of each second token behind ``prompt``, summed over all first ones that do not end it."""
    sides = []
    for model in (served.policy, served.reference):
        cache = model(torch.tensor([list(prompt)])).past_key_values
        cache.batch_repeat_interleave(512)
        sides.append(model(torch.arange(512).unsqueeze(1), past_key_values=cache).logits[:, -1])
    rows = ((1 + c) * sides[0] - c * sides[1]).softmax(-1).double()
    goes_on = torch.ones(512, dtype=torch.float64)
    goes_on[END] = 0.0
    return (first * goes_on) @ rows


def test_scores_beside_drafting_requests(served: Served) -> None:
    """Steps in which somebody scores draft nothing, and the others' tokens are the same."""
    requests = requests_for([0.5, -0.5, 0.0], prompt_length=9)
    prompt, response = [11, 200], [42, 7, 501]

    async def scenario() -> tuple[list[SampledResponse], list[float]]:
        under_way = [asyncio.create_task(served.generator.generate(request)) for request in requests]
        scores = await served.generator.score(prompt, response, 0.5)
        return await asyncio.gather(*under_way), scores

    responses, scores = served.run(scenario())
    for request, given in zip(requests, responses, strict=True):
        assert_replayed(given, request, [(served.policy, LENGTH)], served.reference)
    rows = mixed_logprobs(served.policy, served.reference, prompt + response, 0.5)[len(prompt) - 1 : -1]
    expected = rows.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)


def test_new_weights_midway(served: Served) -> None:
    """Drafts never outlive a step, so each token is of one version, on the caches that the old one left."""
    longs = requests_for([0.3, -0.3, 0.0], prompt_length=3)
    ticket = served.publisher.publish(1, ((n, p) for n, p in served.new.named_parameters()))
    back = served.publisher.publish(2, ((n, p) for n, p in served.policy.named_parameters()))

    async def scenario() -> list[SampledResponse]:
        under_way = [asyncio.create_task(served.generator.generate(request)) for request in longs]
        await served.generator.generate(requests_for([0.5], prompt_length=MODEL_LENGTH - 12)[0])
        await served.generator.update_weights(ticket, deadline_seconds=60)
        return await asyncio.gather(*under_way)

    split = 0
    for request, response in zip(longs, served.run(scenario()), strict=True):
        models = {0: served.policy, 1: served.new}
        stages = [(models[span.version], span.end) for span in response.versions]
        assert_replayed(response, request, stages, served.reference, kept_caches=True)
        split += len(response.versions) == 2
    assert split >= 1
    served.run(served.generator.update_weights(back, deadline_seconds=60))


def test_greedy_is_exactly_greedy(tmp_path: Path, run: Run) -> None:
    served = Served(tmp_path, run, temperature=0.0)
    requests = requests_for(COEFFICIENTS, prompt_length=8)
    run(served.generator.start())
    responses = served.ask(requests)
    run(served.generator.stop())
    for request, response in zip(requests, responses, strict=True):
        prompt = list(request.prompt_token_ids)
        c, tokens = request.coefficient, prompt + list(response.token_ids)
        rows = mixed_logprobs(served.policy, served.reference, tokens, c)[len(prompt) - 1 : -1]
        assert rows.argmax(-1).tolist() == list(response.token_ids)
        torch.testing.assert_close(torch.tensor(response.logprobs), rows.max(-1).values, atol=1e-3, rtol=0)
        assert response.token_ids[-1] == END or len(response.token_ids) == LENGTH
    assert len({response.token_ids for response in responses}) == len(COEFFICIENTS)


@pytest.mark.long
def test_adaptive_drafts_change_no_token_at_another_temperature(tmp_path: Path, run: Run) -> None:
    """Policy and reference are strangers here, so that windows shrink; at temperature and top-p other than 1."""

    def answers(speculation: Speculation | None) -> tuple[list[SampledResponse], float]:
        served = Served(tmp_path, run, temperature=0.7, top_p=0.9, speculation=speculation)
        run(served.generator.start())
        try:
            given = served.ask(requests_for(COEFFICIENTS, prompt_length=5, shared=0))
            return given, run(served.generator.draft_counts()).tokens_per_pass
        finally:
            run(served.generator.stop())

    plain, one_at_a_time = answers(None)
    drafted, several = answers(Speculation(tokens=8, adaptive=True))
    assert one_at_a_time == 1 < several
    for one, other in zip(plain, drafted, strict=True):
        assert other.token_ids == one.token_ids
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
