"""Advantages of whole rollouts against loops in numpy, and token weights against the reductions they stand for."""

from typing import Any

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped

from pilaf_ray.losses import rollout_targets as module
from pilaf_ray.losses.policy_gradient import aggregate
from pilaf_ray.losses.rollout_targets import AdvantageSettings, RolloutBatch

checked = jaxtyped(typechecker=beartype)
rollout_targets = checked(module.rollout_targets)
token_weights = checked(module.token_weights)

LENGTHS = [3, 5, 1, 4]
KL = 0.2


def example(scores: list[float]) -> RolloutBatch:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    behaviour, reference, values = torch.randn(3, 4, 5, generator=generator)
    # What stands outside the mask must never be read.
    behaviour[~mask] = torch.nan
    return RolloutBatch(
        scores=torch.tensor(scores),
        behaviour_logprobs=behaviour,
        reference_logprobs=reference,
        mask=mask,
        values=values,
    )


def settings(kind: Any, **more: Any) -> AdvantageSettings:
    return AdvantageSettings(**{"kind": kind, "group_size": 2, "kl_in_reward": True} | more)


def kl_of(batch: RolloutBatch, row: int) -> np.ndarray[Any, Any]:
    n = LENGTHS[row]
    return (batch.behaviour_logprobs[row, :n] - batch.reference_logprobs[row, :n]).numpy().astype(float)


@pytest.mark.parametrize("in_reward", [True, False])
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups_compare_whole_responses(kind: str, in_reward: bool) -> None:
    batch = example([1.0, -9.0, 0.5, 0.25])
    found = rollout_targets(batch, settings(kind, kl_in_reward=in_reward, score_clip=2.0), kl_coefficient=KL)
    scores = [1.0, -2.0, 0.5, 0.25]
    whole = [score - (KL * kl_of(batch, i).sum() if in_reward else 0.0) for i, score in enumerate(scores)]
    for i, length in enumerate(LENGTHS):
        other = whole[i ^ 1]
        expected = whole[i] - other
        if kind == "grpo":
            pair = np.array([whole[i], other])
            expected = (whole[i] - pair.mean()) / (pair.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(found.advantages[i, :length].numpy(), expected, atol=1e-5)
        assert found.advantages[i, length:].tolist() == [0.0] * (5 - length)
        assert found.sequence_kl[i].item() == pytest.approx(kl_of(batch, i).sum(), abs=1e-5)
    assert found.returns is None


def test_ppo_is_a_backward_recursion_over_token_rewards() -> None:
    batch = example([1.0, -1.0, 0.5, 2.0])
    found = rollout_targets(batch, settings("ppo", discount=0.9, trace_decay=0.8), kl_coefficient=KL)
    assert found.returns is not None and batch.values is not None
    for i, length in enumerate(LENGTHS):
        rewards = -KL * kl_of(batch, i)
        rewards[-1] += batch.scores[i].item()
        values = [*batch.values[i, :length].tolist(), 0.0]
        running = 0.0
        for t in reversed(range(length)):
            running = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * running
            assert found.advantages[i, t].item() == pytest.approx(running, abs=1e-5)
            assert found.returns[i, t].item() == pytest.approx(running + values[t], abs=1e-5)


def test_whitened_advantages_have_unit_moments_on_the_mask() -> None:
    batch = example([1.0, -1.0, 0.5, 2.0])
    found = rollout_targets(batch, settings("ppo", whiten_advantages=True, whiten_rewards=True), kl_coefficient=KL)
    inside = found.advantages[batch.mask]
    assert inside.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert inside.std(correction=1).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@pytest.mark.parametrize("whitened", [True, False])
def test_identical_rewards_give_zeros_and_no_nan(kind: str, whitened: bool) -> None:
    batch = example([0.3, 0.3, 0.3, 0.3])
    found = rollout_targets(batch, settings(kind, kl_in_reward=False, whiten_advantages=whitened), kl_coefficient=KL)
    assert found.advantages.abs().max().item() == 0.0


@pytest.mark.parametrize("how", ["token_mean", "response_mean", "response_sum"])
def test_weights_add_up_to_the_reduction(how: Any) -> None:
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    loss = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    weights = token_weights(mask, how=how)
    assert (loss * weights).sum().item() == pytest.approx(aggregate(loss, mask, how=how).item(), abs=1e-6)
    assert weights[~mask].abs().sum() == 0.0
