"""Labelled pairs for learners that are tried alone."""

from dataclasses import replace

import torch

from pilaf_ray.types import (
    FinishReason,
    LabeledPair,
    PairCost,
    PairDraw,
    PairPlan,
    PreferenceLabel,
    Prompt,
    ReferenceLogprobs,
    ResponsePair,
    SampledResponse,
    VersionSpan,
)


def batch(*, reference: float = -30.0) -> list[LabeledPair]:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 500, (count,), generator=generator).tolist())

    def response(count: int) -> SampledResponse:
        return SampledResponse(
            token_ids=tokens(count),
            text="",
            coefficient=0.0,
            logprobs=(0.0,) * count,
            versions=(VersionSpan(version=0, start=0, end=count),),
            finish_reason=FinishReason.LENGTH,
        )

    items = []
    for i in range(6):
        plan = PairPlan(
            pair_id=str(i),
            index=i,
            prompt=Prompt(prompt_id=str(i), text="", token_ids=tokens(5 + i)),
            branch="on_policy",
            coefficient_a=0.0,
            coefficient_b=0.0,
            seed_a=0,
            seed_b=0,
            present_b_first=False,
            label_seed=0,
        )
        items.append(
            LabeledPair(
                pair=ResponsePair(plan=plan, a=response(4 + i % 3), b=response(6 - i % 2)),
                label=PreferenceLabel(pair_id=str(i), probability=float(i % 2), source="test"),
                reference=ReferenceLogprobs(pair_id=str(i), a=reference, b=-31.0),
            )
        )
    return items


def weighted(item: LabeledPair, weight: float) -> LabeledPair:
    cost = PairCost(sequence_forwards=2, labelled_responses=2)
    draw = PairDraw(branch="on_policy", cost=cost, loss_weight=weight)
    return replace(item, pair=replace(item.pair, draw=draw))
