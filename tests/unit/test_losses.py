"""Preference losses against hand computation."""

import math

import pytest
import torch

from pilaf_ray.losses.logprobs import token_logprobs
from pilaf_ray.losses.preference import LOSSES, PreferenceInputs, dpo_loss, ipo_loss

VALUES = {"policy_a": -3.0, "policy_b": -5.0, "reference_a": -4.0, "reference_b": -4.5}


def inputs(probability: float, **changes: float) -> PreferenceInputs:
    values = {**VALUES, "length_a": 2.0, "length_b": 4.0, "probability": probability, **changes}
    return PreferenceInputs(**{name: torch.tensor([value]) for name, value in values.items()})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("p", [1.0, 0.0, 0.5, 0.3])
def test_dpo_is_the_cross_entropy_of_the_margin(p: float) -> None:
    margin = 0.2 * ((-3.0 + 4.0) - (-5.0 + 4.5))
    expected = -p * math.log(sigmoid(margin)) - (1 - p) * math.log(sigmoid(-margin))
    assert dpo_loss(inputs(p), beta=0.2).loss.item() == pytest.approx(expected, rel=1e-6)


def test_label_smoothing_mixes_both_orders() -> None:
    hard, flipped = dpo_loss(inputs(1.0), beta=0.2).loss, dpo_loss(inputs(0.0), beta=0.2).loss
    smooth = dpo_loss(inputs(1.0), beta=0.2, label_smoothing=0.1).loss
    assert smooth.item() == pytest.approx(0.9 * hard.item() + 0.1 * flipped.item(), rel=1e-6)


def test_ipo_uses_means_per_token() -> None:
    h = 1.0 / 2 - (-0.5) / 4
    assert ipo_loss(inputs(1.0), beta=0.5).loss.item() == pytest.approx((h - 1.0) ** 2, rel=1e-6)
    assert ipo_loss(inputs(0.0), beta=0.5).loss.item() == pytest.approx((h + 1.0) ** 2, rel=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_the_weight_scales_the_loss_and_nothing_else(name: str) -> None:
    plain, heavy = LOSSES[name](inputs(0.7), beta=0.3), LOSSES[name](inputs(0.7, weight=2.5), beta=0.3)
    torch.testing.assert_close(heavy.loss, 2.5 * plain.loss)
    torch.testing.assert_close(heavy.metrics, plain.metrics)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_swapping_sides_and_label_changes_nothing(name: str) -> None:
    swapped = PreferenceInputs(
        **{
            key: torch.tensor([value])
            for key, value in {
                "policy_a": -5.0,
                "policy_b": -3.0,
                "reference_a": -4.5,
                "reference_b": -4.0,
                "length_a": 4.0,
                "length_b": 2.0,
                "probability": 0.3,
            }.items()
        }
    )
    one, other = LOSSES[name](inputs(0.7), beta=0.3), LOSSES[name](swapped, beta=0.3)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.metrics["margin"], other.metrics["margin"])


def test_identical_pair_costs_log_two_and_gradient_favours_the_chosen() -> None:
    a = torch.tensor([-3.0], requires_grad=True)
    b = torch.tensor([-3.0], requires_grad=True)
    one = torch.tensor([1.0])
    reference = torch.tensor([-3.0])
    loss = dpo_loss(
        PreferenceInputs(
            policy_a=a,
            policy_b=b,
            reference_a=reference,
            reference_b=reference,
            length_a=one,
            length_b=one,
            probability=one,
        ),
        beta=0.1,
    ).loss.sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert a.grad is not None and b.grad is not None
    assert a.grad.item() == pytest.approx(-0.05, rel=1e-6)
    assert b.grad.item() == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_logprobs_equal_full_logits_in_value_and_gradient(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float32, requires_grad=True)
    head = torch.nn.Linear(5, 11)
    targets = torch.randint(0, 11, (7,))
    full = head(hidden).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    full.square().sum().backward()
    wanted = [hidden.grad.clone(), head.weight.grad.clone()]  # type: ignore[union-attr]
    hidden.grad = head.weight.grad = None
    chunked = token_logprobs(hidden, targets, head, chunk)
    torch.testing.assert_close(chunked, full)
    chunked.square().sum().backward()
    torch.testing.assert_close([hidden.grad, head.weight.grad], wanted)
