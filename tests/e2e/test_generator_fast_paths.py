"""Engines that draft ahead or share their base give the tokens of one that does neither, and the log-probabilities."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from generator_replay import (
    END,
    alike,
    assert_likeliest,
    assert_records,
    assert_replayed,
    chi_square_z,
    mixed_logprobs,
    second_token,
)
from generator_served import COEFFICIENTS, LENGTH, MODEL_LENGTH, Run, Served, requests_for
from reference_rows import ALLOW, reference_rows

from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.types import DraftCounts, GenerationRequest, SampledResponse

TWO_NETWORKS = {"speculation": Speculation(tokens=5, adaptive=False)}
ENGINES = {
    "two networks, fixed drafts": TWO_NETWORKS,
    "one base": {"shares_base": True},
    "one base, adaptive drafts": {"shares_base": True, "speculation": Speculation(tokens=5, adaptive=True)},
}
PROMPT = requests_for([0.5], prompt_length=MODEL_LENGTH - 2)[0].prompt_token_ids
"""Behind it there is room for two tokens."""
on_two_networks = pytest.mark.parametrize("served", [TWO_NETWORKS], ids=["two networks, fixed drafts"], indirect=True)
on_all = pytest.mark.parametrize("served", ENGINES.values(), ids=ENGINES, indirect=True)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run: Run) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALLOW.items():
            patch.setenv(name, value)
        served = Served(tmp_path_factory.mktemp("run"), run, **request.param)
        served.start()
        yield served
        served.stop()


def counted(served: Served) -> DraftCounts:
    return served.run(served.generator.draft_counts())


@on_all
@pytest.mark.parametrize(("prompt_length", "shared"), [(5, 0), (200, 160)], ids=["short", "shared prefix, preempted"])
def test_eight_coefficients_in_one_batch(served: Served, prompt_length: int, shared: int) -> None:
    """Tokens by the documented rule, log-probabilities of mixture, policy and reference by hand."""
    requests = requests_for(COEFFICIENTS, prompt_length=prompt_length, shared=shared)
    before, counts = served.generator.preemptions, counted(served)
    responses = served.ask(requests)
    assert (served.generator.preemptions > before) == bool(shared)
    for request, response in zip(requests, responses, strict=True):
        assert_replayed(response, request, [(served.policy, LENGTH)], served.reference)
        assert_records(response, request, served.models)
        assert (response.finish_reason == "stop") == (response.token_ids[-1] == END)
    after = counted(served)
    mixed = sum(len(r.token_ids) for r in responses if r.coefficient)
    assert after.kept - counts.kept < mixed
    if served.drafts:
        # What is computed again after a preemption is already drawn, so each token is judged once.
        assert after.judged - counts.judged == mixed
        assert after.passes - counts.passes < mixed < after.drafted - counts.drafted


@on_all
def test_plain_requests_cost_the_reference_no_rows(served: Served) -> None:
    """And mixed ones beside them cost it their own: each token but the last, and drafts that were replaced."""
    plain = requests_for([0.0] * 4, prompt_length=11)
    start = served.run(reference_rows(served.generator))
    served.ask(plain)
    assert served.run(reference_rows(served.generator)) == start
    requests = requests_for([0.0, 0.5, 0.0, -1.0], prompt_length=12)
    before = counted(served).drafted
    served.ask(requests)
    prompts = sum(len(request.prompt_token_ids) - 1 for request in requests if request.coefficient)
    assert served.run(reference_rows(served.generator)) - start == prompts + counted(served).drafted - before


@on_all
def test_next_token_distribution(served: Served) -> None:
    """Chi-square of second tokens, which may be drafts ahead, against their exact mixture.

    On one base fewer draws do, of groups of tokens that policy and reference disagree about to about one degree.
    """
    draws = {0.5: 3_000, -0.5: 2_500, -1.0: 2_500, 0.0: 2_500}
    expected = {c: second_token(served.models, PROMPT, c) for c in draws}
    if served.shares_base:
        draws = {0.5: 700, -0.5: 700, -1.0: 700, 0.0: 400}
    plain, rank = expected[0.0], expected[-1.0] / expected[0.0]

    def deviate(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
        if served.shares_base:
            counts, probabilities = (alike(side, rank, weights=plain, groups=48) for side in (counts, probabilities))
        return chi_square_z(counts, probabilities)

    for c, counts in second_tokens(served, draws).items():
        assert deviate(counts, expected[c]) < 3.1, c  # p > 0.001
        assert (deviate(counts, plain) < 3.1) == (c == 0.0), "so many draws tell mixtures from the policy"


def second_tokens(served: Served, draws: dict[float, int]) -> dict[float, torch.Tensor]:
    """How often each token, (vocab,), was the second of so many responses of each coefficient, which share batches."""
    requests = [
        GenerationRequest(request_id=f"chi-{c}-{i}", prompt_token_ids=PROMPT, coefficient=c, seed=i)
        for c, count in draws.items()
        for i in range(count)
    ]
    random.Random(0).shuffle(requests)
    found: dict[float, list[int]] = {c: [] for c in draws}
    for request, response in zip(requests, served.ask(requests), strict=True):
        found[request.coefficient] += response.token_ids[1:]
    return {c: torch.bincount(torch.tensor(tokens), minlength=512).double() for c, tokens in found.items()}


@on_all
def test_greedy_is_exactly_greedy(served: Served) -> None:
    requests = requests_for(COEFFICIENTS, prompt_length=8)
    responses = served.ask_greedily(requests)
    for request, response in zip(requests, responses, strict=True):
        assert_likeliest(response, request, served.models, length=LENGTH)
    assert len({response.token_ids for response in responses}) == len(COEFFICIENTS)


@on_two_networks
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


@on_two_networks
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


@pytest.mark.long
def test_adaptive_drafts_change_no_token_at_another_temperature(tmp_path: Path, run: Run) -> None:
    """Policy and reference are strangers here, so that windows shrink; at temperature and top-p other than 1."""

    def answers(speculation: Speculation | None) -> tuple[list[SampledResponse], float]:
        served = Served(tmp_path, run, temperature=0.7, top_p=0.9, speculation=speculation)
        served.start()
        try:
            given = served.ask(requests_for(COEFFICIENTS, prompt_length=5, shared=0))
            return given, counted(served).tokens_per_pass
        finally:
            served.stop()

    plain, one_at_a_time = answers(None)
    drafted, several = answers(Speculation(tokens=8, adaptive=True))
    assert one_at_a_time == 1 < several
    for one, other in zip(plain, drafted, strict=True):
        assert other.token_ids == one.token_ids
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
