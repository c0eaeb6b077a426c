"""Advantages against loops in numpy."""

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped

from pilaf_ray.losses import advantages as module

checked = jaxtyped(typechecker=beartype)
leave_one_out_advantages = checked(module.leave_one_out_advantages)
group_relative_advantages = checked(module.group_relative_advantages)
generalized_advantages = checked(module.generalized_advantages)
token_rewards = checked(module.token_rewards)
whiten = checked(module.whiten)

REWARDS = [0.3, -1.0, 2.0, 0.5, 0.1, 0.1, -3.0, 4.0]


def test_leave_one_out_is_reward_minus_mean_of_the_others() -> None:
    expected = []
    for i, reward in enumerate(REWARDS):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        expected.append(reward - np.mean([REWARDS[j] for j in group if j != i]))
    ours = leave_one_out_advantages(torch.tensor(REWARDS), group_size=4)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [True, False])
def test_group_relative_is_the_z_score_of_the_group(scale: bool) -> None:
    groups = np.array(REWARDS).reshape(2, 4)
    expected = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        expected /= groups.std(axis=1, ddof=1, keepdims=True) + 1e-4
    ours = group_relative_advantages(torch.tensor(REWARDS), group_size=4, scale=scale)
    np.testing.assert_allclose(ours.numpy(), expected.flatten(), atol=1e-6)


@pytest.mark.parametrize("value", [0.1, -1e4, 1e-30, 0.0])
@pytest.mark.parametrize("estimator", [leave_one_out_advantages, group_relative_advantages])
def test_identical_rewards_give_exact_zeros(estimator, value: float) -> None:  # type: ignore[no-untyped-def]
    """Seven copies of 0.1 do not have 0.1 as their float32 mean."""
    assert torch.equal(estimator(torch.full((14,), value), group_size=7), torch.zeros(14))


@pytest.mark.parametrize(("count", "group_size"), [(4, 1), (5, 2), (4, 0)])
@pytest.mark.parametrize("estimator", [leave_one_out_advantages, group_relative_advantages])
def test_no_groups_no_advantages(estimator, count: int, group_size: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="do not form groups"):
        estimator(torch.zeros(count), group_size=group_size)


MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [False, True, True, False]])


def test_gae_equals_the_double_sum() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 4))
    gamma, lam = 0.9, 0.8
    outcome = generalized_advantages(torch.tensor(rewards), torch.tensor(values), MASK, discount=gamma, trace_decay=lam)
    for i, row in enumerate(MASK.numpy()):
        steps = np.flatnonzero(row)
        r, v = rewards[i, steps], np.append(values[i, steps], 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        for t, step in enumerate(steps):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(len(steps) - t))
            assert outcome.advantages[i, step].item() == pytest.approx(expected, abs=1e-12)
            assert outcome.returns[i, step].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert (outcome.advantages[~MASK] == 0).all() and (outcome.returns[~MASK] == 0).all()


def test_gae_with_both_decays_one_is_return_minus_value() -> None:
    rewards, values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    outcome = generalized_advantages(rewards, values, MASK, trace_decay=1.0)
    to_go = torch.where(MASK, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(outcome.returns, torch.where(MASK, to_go, 0.0))


def test_padding_is_never_read() -> None:
    rewards, values = torch.full((2, 3, 4), torch.nan)
    rewards[MASK], values[MASK] = 1.0, 0.5
    outcome = generalized_advantages(rewards, values, MASK)
    assert not outcome.advantages.isnan().any() and not outcome.returns.isnan().any()


def test_token_rewards_charge_each_token_and_pay_at_the_last() -> None:
    kl = torch.full((3, 4), 2.0)
    ours = token_rewards(torch.tensor([1.0, 10.0, -10.0]), kl, MASK, kl_coefficient=0.1, score_clip=5.0)
    expected = [[-0.2, -0.2, -0.2, 0.8], [-0.2, 4.8, 0.0, 0.0], [0.0, -0.2, -5.2, 0.0]]
    torch.testing.assert_close(ours, torch.tensor(expected))
    with pytest.raises(ValueError, match="without a token"):
        token_rewards(torch.zeros(1), torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool), kl_coefficient=0.1)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_over_the_mask(shift_mean: bool) -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)) * 3.0 + 7.0
    chosen = values[MASK].double().numpy()
    expected = (chosen - chosen.mean()) / chosen.std(ddof=1) + (0.0 if shift_mean else chosen.mean())
    ours = whiten(values, MASK, shift_mean=shift_mean)
    np.testing.assert_allclose(ours[MASK].numpy(), expected, atol=1e-5)
    assert (ours[~MASK] == 0).all()


def test_ranks_whiten_together() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    together = whiten(values, MASK)
    moments = sum(module.masked_moments(values[i : i + 1], MASK[i : i + 1]) for i in range(3))
    apart = torch.cat([whiten(values[i : i + 1], MASK[i : i + 1], moments=moments) for i in range(3)])
    torch.testing.assert_close(apart, together)


def test_constant_and_empty_values_whiten_to_zeros() -> None:
    assert whiten(torch.full((3, 4), 0.1), MASK).abs().max() < 1e-6
    assert torch.equal(whiten(torch.ones(3, 4), torch.zeros_like(MASK)), torch.zeros(3, 4))
