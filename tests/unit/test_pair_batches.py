"""Micro-batches of pairs keep their token budget, shared or apart."""

from dataclasses import replace

from pairs import pair

from pilaf_ray.data.pair_batches import PairBatches
from pilaf_ray.types import ResponsePair


def sized(index: int, prompt: int, response: int) -> ResponsePair:
    made = pair(index)
    plan = replace(made.plan, prompt=replace(made.plan.prompt, token_ids=(1,) * prompt))
    side = replace(made.a, token_ids=(5,) * response)
    return replace(made, plan=plan, a=side, b=side)


def padded_tokens(batches: PairBatches, pairs: list[ResponsePair]) -> list[int]:
    return [batches.collate([pairs[i] for i in group]).input_ids.numel() for group in batches.groups(pairs)]


def test_sharing_a_prompt_fills_the_budget_with_more_pairs() -> None:
    pairs = [sized(i, 60, 20) for i in range(6)]
    assert padded_tokens(PairBatches(share=True, max_tokens=320), pairs) == [300, 300]
    assert padded_tokens(PairBatches(share=False, max_tokens=320), pairs) == [320, 320, 320]


def test_a_pair_too_long_to_share_keeps_the_budget() -> None:
    pairs = [sized(0, 100, 2100), sized(1, 100, 100), sized(2, 100, 100)]
    assert max(padded_tokens(PairBatches(share=True, max_tokens=4400), pairs)) <= 4400
