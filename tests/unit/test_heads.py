"""Bootstrapped heads of r̂, their disagreement, and the pairs that go to people for it."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from pairs import pair
from test_judge_and_mixture import Source

from pilaf_ray.losses import bradley_terry as module
from pilaf_ray.oracle.mixture import MixtureOracle, MixtureRules, TopShare
from pilaf_ray.pipeline.disagreement import HeadDisagreement
from pilaf_ray.sampling.identity import bootstrap_weights
from pilaf_ray.types import ResponsePair, RewardScores, ScoringItem

bootstrapped_loss = jaxtyped(typechecker=beartype)(module.bootstrapped_loss)


def test_each_head_draws_a_bootstrap_of_its_own_that_only_the_pair_decides() -> None:
    drawn = [bootstrap_weights(f"pair-{i}", 4) for i in range(5000)]
    assert drawn[7] == bootstrap_weights("pair-7", 4) and len({tuple(d[h] for d in drawn) for h in range(4)}) == 4
    assert bootstrap_weights("pair-7", 8)[:4] == drawn[7], "heads that are added leave the others what they had"
    for head in range(4):
        counts = Counter(weights[head] for weights in drawn)
        for k in range(5):
            expected = math.exp(-1) / math.factorial(k)
            error = math.sqrt(expected * (1 - expected) / 5000)
            assert counts[float(k)] / 5000 == pytest.approx(expected, abs=4 * error), (head, k)
    # Of two heads: what one draws says nothing about the other.
    pairs = torch.tensor(drawn)
    assert torch.corrcoef(pairs.T).fill_diagonal_(0).abs().max() < 4 / math.sqrt(5000)
    assert {bootstrap_weights(f"pair-{i}", 1) for i in range(100)} == {(1.0,)}


def test_loss_of_heads_by_hand() -> None:
    # Two pairs, two heads; rows are a, b of the first pair and a, b of the second.
    rewards = torch.tensor([[1.0, 0.2], [0.0, 0.5], [-1.0, 2.0], [0.5, 2.0]])
    weights = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    loss = bootstrapped_loss(rewards, torch.tensor([1.0, 0.25]), weights, centering=0.1)

    def bt(a: float, b: float, p: float) -> float:
        return p * math.log1p(math.exp(b - a)) + (1 - p) * math.log1p(math.exp(a - b)) + 0.1 * (a + b) ** 2

    expected = [2 * bt(1.0, 0.0, 1.0) / 2, (bt(-1.0, 0.5, 0.25) + 3 * bt(2.0, 2.0, 0.25)) / 2]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_one_head_is_bit_for_bit_the_plain_loss() -> None:
    rewards = torch.randn(64, generator=torch.Generator().manual_seed(0))
    probability = torch.rand(32, generator=torch.Generator().manual_seed(1))
    plain, several = rewards.clone().requires_grad_(), rewards.clone().requires_grad_()
    expected = module.bradley_terry_loss(plain[0::2], plain[1::2], probability).loss
    found = bootstrapped_loss(several[:, None], probability, torch.ones(32, 1))
    expected.sum().backward()
    found.sum().backward()
    assert torch.equal(found, expected) and plain.grad is not None and several.grad is not None
    assert torch.equal(several.grad, plain.grad)


def test_the_largest_share_of_the_newest_numbers_and_no_scale() -> None:
    numbers = [random.Random(i).random() for i in range(3000)]
    chosen = TopShare(0.2, 50)
    taken = [chosen.take(number) for number in numbers]
    newest: list[float] = []
    for number, was_taken in zip(numbers, taken, strict=True):
        newest = [*newest, number][-50:]
        assert was_taken == (number in sorted(newest, reverse=True)[: int(0.2 * len(newest))])
    assert sum(taken) / 3000 == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / 3000))
    larger = TopShare(0.2, 50)
    assert [larger.take(1000 * number) for number in numbers] == taken
    alike = TopShare(0.2, 50)
    assert not any(alike.take(0.0) for _ in range(100)), "heads that know nothing yet disagree about nothing"
    assert not any(TopShare(0.01, 10).take(n) for n in range(99)), "nothing is judged before 1/share numbers"


class Heads:
    """A reward model of three heads: lengths, their opposites, and nothing."""

    def __init__(self) -> None:
        self.asked = 0

    async def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        self.asked += 1
        rows = tuple((float(len(i.text)), 7.0 - len(i.text), 3.0) for i in items)
        return RewardScores(version=1, values=tuple(sum(row) / 3 for row in rows), heads=rows)


async def test_disagreement_is_about_which_is_better() -> None:
    # Differences of the heads: 4, −4 and 0.
    assert await HeadDisagreement(Heads())(pair(0, a="12345", b="1")) == pytest.approx(math.sqrt(32 / 3))
    assert await HeadDisagreement(Heads())(pair(0, a="12345", b="54321")) == 0.0


async def test_people_get_what_heads_disagree_about_and_no_more_than_their_budget() -> None:
    # Of every ten pairs the last has sides whose lengths differ most.
    pairs = [pair(i, a="x" * (2 + i % 10), b="x") for i in range(60)]
    rules = MixtureRules(share=0.0, disagreement=0.1, disagreement_window=10, people_budget=3)
    people, machine, heads = Source("human"), Source("judge"), Heads()
    mixture = MixtureOracle(people=people, machine=machine, rules=rules, disagreement=HeadDisagreement(heads))
    labels = await mixture.label(pairs)
    assert people.asked == ["pair-9", "pair-19", "pair-29"]
    assert [label.source for label in labels].count("judge") == 57
    assert heads.asked == 30, "once people's budget is spent nobody asks r̂"


async def test_audited_pairs_are_not_scored() -> None:
    async def never(_pair: ResponsePair) -> float:
        raise AssertionError("an audited pair goes to people anyway")

    rules = MixtureRules(share=1.0, disagreement=0.1)
    mixture = MixtureOracle(people=Source("human"), machine=Source("judge"), rules=rules, disagreement=never)
    assert [label.source for label in await mixture.label([pair(0), pair(1)])] == ["human"] * 2
