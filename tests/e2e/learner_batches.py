"""Labelled pairs for learners that are tried alone."""

from dataclasses import replace

import torch

from pilaf_ray.data.made_pairs import made_pair
from pilaf_ray.types import LabeledPair, PairCost, PairDraw


def batch(*, reference: float = -30.0) -> list[LabeledPair]:
    """Six pairs of random tokens, the same in every process."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 500, (count,), generator=generator).tolist()

    return [
        made_pair(
            i,
            prompt=tokens(5 + i),
            a=tokens(4 + i % 3),
            b=tokens(6 - i % 2),
            probability=float(i % 2),
            reference=(reference, -31.0),
        )
        for i in range(6)
    ]


def weighted(item: LabeledPair, weight: float) -> LabeledPair:
    cost = PairCost(sequence_forwards=2, labelled_responses=2)
    draw = PairDraw(branch="on_policy", cost=cost, loss_weight=weight)
    return replace(item, pair=replace(item.pair, draw=draw))
