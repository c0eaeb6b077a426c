"""The reward model's loss, its fit on synthetic pairs, and its calibration."""

import math

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped

from pilaf_ray.losses import bradley_terry as module

checked = jaxtyped(typechecker=beartype)
bradley_terry_loss = checked(module.bradley_terry_loss)
calibration_error = checked(module.calibration_error)


@pytest.mark.parametrize("p", [1.0, 0.0, 0.5, 0.3])
def test_value_and_gradient_by_hand(p: float) -> None:
    a, b = torch.tensor([1.2], requires_grad=True), torch.tensor([-0.4], requires_grad=True)
    loss = bradley_terry_loss(a, b, torch.tensor([p])).loss
    loss.sum().backward()
    win = 1 / (1 + math.exp(-1.6))
    assert loss.item() == pytest.approx(-p * math.log(win) - (1 - p) * math.log(1 - win), rel=1e-6)
    assert a.grad is not None and b.grad is not None
    assert a.grad.item() == pytest.approx(win - p, abs=1e-6)
    assert b.grad.item() == pytest.approx(p - win, abs=1e-6)


def test_huge_margins_stay_finite() -> None:
    a = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = bradley_terry_loss(a, torch.zeros(2), torch.tensor([1.0, 1.0])).loss
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([0.0, 500.0]))
    torch.testing.assert_close(a.grad, torch.tensor([0.0, -1.0]))


def test_a_tie_pulls_rewards_together() -> None:
    a, b = torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    bradley_terry_loss(a, b, torch.tensor([0.5])).loss.sum().backward()
    assert a.grad is not None and b.grad is not None and a.grad.item() > 0 > b.grad.item()


def test_accuracy_counts_ties_half() -> None:
    metrics = bradley_terry_loss(
        torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0]),
        torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5]),
    ).metrics  # fmt: skip
    assert metrics["accuracy"].tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert metrics["margin"].tolist() == [1.0, -1.0, 0.0, 1.0, 0.0]


def test_centering_pushes_both_sides_alike() -> None:
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    labels = torch.tensor([1.0])
    plain, centred = (bradley_terry_loss(a, b, labels, centering=c).loss for c in (0.0, 0.01))
    assert (centred - plain).item() == pytest.approx(0.16)
    gradients = torch.autograd.grad((centred - plain).sum(), (a, b))
    torch.testing.assert_close(gradients[0], torch.tensor([0.08]))
    torch.testing.assert_close(gradients[1], torch.tensor([0.08]))


def fit(pairs: torch.Tensor, labels: torch.Tensor, items: int) -> torch.Tensor:
    rewards = torch.zeros(items, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rewards], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(rewards[pairs[:, 0]], rewards[pairs[:, 1]], labels).loss.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return rewards.detach()


def pairs_and_chances(items: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.random.Generator]:
    rng = np.random.default_rng(0)
    truth = torch.tensor(rng.normal(size=items))
    truth -= truth.mean()
    pairs = torch.tensor(np.array([rng.choice(items, size=2, replace=False) for _ in range(count)]))
    return truth, pairs, torch.sigmoid(truth[pairs[:, 0]] - truth[pairs[:, 1]]), rng


def test_soft_labels_recover_the_rewards_exactly() -> None:
    truth, pairs, chance, _ = pairs_and_chances(6, 500)
    free = fit(pairs, chance, 6)
    np.testing.assert_allclose((free - free.mean()).numpy(), truth.numpy(), atol=1e-3)


def test_drawn_labels_recover_the_rewards_within_their_standard_error() -> None:
    """z-scores of the six rewards under the inverse Fisher information."""
    truth, pairs, chance, rng = pairs_and_chances(6, 5000)
    labels = torch.tensor((rng.random(5000) < chance.numpy()).astype(float))
    fitted = fit(pairs, labels, 6)
    design = torch.zeros(5000, 6, dtype=torch.float64)
    design[torch.arange(5000), pairs[:, 0]] = 1.0
    design[torch.arange(5000), pairs[:, 1]] -= 1.0
    information = design.T @ (design * (chance * (1 - chance))[:, None])
    # The common level of all rewards is not identified: its eigenvalue is zero but for rounding.
    errors = torch.linalg.pinv(information, hermitian=True, rtol=1e-9).diagonal().sqrt()
    z = ((fitted - fitted.mean()) - truth) / errors
    assert z.abs().max() < 3.5
    assert errors.max() < 0.1


def test_calibration_error_by_hand() -> None:
    """Two bins: confidences 0.6, 0.7 (one right), and 0.9, 0.9 (both right)."""
    confidence = torch.tensor([0.6, 0.7, 0.9, 0.9])
    margin = torch.logit(confidence) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    probability = torch.tensor([1.0, 1.0, 1.0, 0.0])
    expected = 0.5 * abs(0.65 - 0.5) + 0.5 * abs(0.9 - 1.0)
    assert calibration_error(margin, probability, bins=2).item() == pytest.approx(expected, abs=1e-6)
    swapped = calibration_error(-margin, 1.0 - probability, bins=2)
    assert swapped.item() == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_true_chances_is_small_and_of_a_bold_model_large() -> None:
    rng = np.random.default_rng(1)
    margin = torch.tensor(rng.normal(size=20_000))
    chance = torch.sigmoid(margin)
    assert calibration_error(margin, chance).item() < 1e-9
    drawn = torch.tensor((rng.random(20_000) < chance.numpy()).astype(float))
    assert calibration_error(margin, drawn).item() < 0.02
    assert calibration_error(3.0 * margin, drawn).item() > 0.1
    assert calibration_error(torch.zeros(0), torch.zeros(0)).isnan()
