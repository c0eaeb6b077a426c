"""Policy-gradient losses and gradients against numpy and against exact expectations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped

from pilaf_ray.losses import policy_gradient as module
from pilaf_ray.losses.policy_gradient import AdaptiveKlController, PolicyGradientInputs

checked = jaxtyped(typechecker=beartype)
clipped_surrogate = checked(module.clipped_surrogate)
clipped_value_loss = checked(module.clipped_value_loss)
kl_to_reference = checked(module.kl_to_reference)
aggregate = checked(module.aggregate)

MASK = torch.tensor([[True, True, True], [True, True, False]])


def example() -> PolicyGradientInputs:
    generator = torch.Generator().manual_seed(0)
    new, old, behaviour, advantages = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    return PolicyGradientInputs(
        logprobs=(old + 0.5 * new).requires_grad_(),
        old_logprobs=old,
        behaviour_logprobs=old + behaviour,
        advantages=advantages,
        mask=MASK,
    )


def test_clipped_surrogate_value_gradient_and_metrics() -> None:
    inputs = example()
    result = clipped_surrogate(inputs, clip_low=0.1, clip_high=0.3, importance_cap=1.5)
    result.loss.sum().backward()
    assert inputs.behaviour_logprobs is not None and inputs.logprobs.grad is not None
    seen = set()
    for i, t in MASK.nonzero().tolist():
        ratio = math.exp(inputs.logprobs[i, t].item() - inputs.old_logprobs[i, t].item())
        weight = min(math.exp(inputs.old_logprobs[i, t].item() - inputs.behaviour_logprobs[i, t].item()), 1.5)
        advantage = inputs.advantages[i, t].item()
        bounded = min(max(ratio, 0.9), 1.3)
        held = bounded * advantage < ratio * advantage
        seen.add(held)
        assert result.loss[i, t].item() == pytest.approx(-weight * min(ratio * advantage, bounded * advantage))
        # Where the clipped branch is the smaller one, nothing is left to climb.
        assert inputs.logprobs.grad[i, t].item() == pytest.approx(0.0 if held else -weight * ratio * advantage)
        assert result.metrics["clipped"][i, t].item() == held
        assert result.metrics["importance_weight"][i, t].item() == pytest.approx(weight)
        assert result.metrics["truncated"][i, t].item() == (weight == 1.5)
    assert seen == {True, False}
    assert result.loss[~MASK].item() == 0.0 and inputs.logprobs.grad[~MASK].item() == 0.0


def test_gradcheck() -> None:
    inputs = example()

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return module.clipped_surrogate(replace(inputs, logprobs=logprobs), importance_cap=2.0).loss

    assert torch.autograd.gradcheck(loss, (inputs.logprobs,))


def test_padding_never_reaches_loss_or_gradient() -> None:
    inputs = example()
    spoilt = {
        name: torch.where(MASK, getattr(inputs, name).detach(), torch.nan).requires_grad_(name == "logprobs")
        for name in ("logprobs", "old_logprobs", "behaviour_logprobs", "advantages")
    }
    result = clipped_surrogate(PolicyGradientInputs(**spoilt, mask=MASK), importance_cap=2.0)
    kl = kl_to_reference(spoilt["logprobs"], spoilt["old_logprobs"], MASK, estimator="k3")
    value = clipped_value_loss(spoilt["logprobs"], spoilt["old_logprobs"], spoilt["advantages"], MASK)
    (result.loss + kl + value.loss).sum().backward()
    assert torch.isfinite(spoilt["logprobs"].grad).all()
    assert all(torch.isfinite(x).all() for x in (result.loss, kl, value.loss, *result.metrics.values()))


def test_a_token_impossible_to_the_behaviour_policy_gets_the_cap() -> None:
    weights = module.truncated_importance_weights(
        torch.tensor([-1.0, -200.0]), torch.tensor([-torch.inf, -1.0]), torch.tensor([True, True]), cap=2.0
    )
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.0]))
    with pytest.raises(ValueError, match="below 1"):
        module.truncated_importance_weights(torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), cap=0.5)


def test_cap_and_behaviour_come_together() -> None:
    with pytest.raises(ValueError, match="together"):
        clipped_surrogate(example())
    with pytest.raises(ValueError, match="together"):
        clipped_surrogate(replace(example(), behaviour_logprobs=None), importance_cap=2.0)


def test_rloo_sum_at_ratio_one_is_the_policy_gradient_exactly() -> None:
    """Over all responses weighted by their probability, the loss has the gradient of −E[A]."""
    logits = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    reward = torch.tensor([0.1, -2.0, 0.7, 3.0], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    mask = torch.ones(4, 1, dtype=torch.bool)
    inputs = PolicyGradientInputs(
        logprobs=logprobs[:, None], old_logprobs=logprobs.detach()[:, None], advantages=reward[:, None], mask=mask
    )
    weighted = clipped_surrogate(inputs).loss * logprobs.detach().exp()[:, None] * 4
    (ours,) = torch.autograd.grad(aggregate(weighted, mask, how="response_sum"), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(-(logprobs.exp() * reward).sum(), logits)
    torch.testing.assert_close(ours, exact)


def test_aggregations_by_hand() -> None:
    loss = torch.tensor([[1.0, 2.0, 6.0], [10.0, 20.0, 1e9]])
    assert aggregate(loss, MASK, how="token_mean").item() == pytest.approx(39 / 5)
    assert aggregate(loss, MASK, how="response_mean").item() == pytest.approx((3.0 + 15.0) / 2)
    assert aggregate(loss, MASK, how="response_sum").item() == pytest.approx((9.0 + 30.0) / 2)
    for how in ("token_mean", "response_mean", "response_sum"):
        assert aggregate(loss, torch.zeros_like(MASK), how=how).item() == 0.0


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_and_its_gradient(clip: float | None) -> None:
    values = torch.tensor([1.0, 1.0, 0.0, 5.0]).requires_grad_()
    old, returns = torch.tensor([0.5, 1.1, 0.0, 0.0]), torch.tensor([2.0, 0.0, -1.0, 0.0])
    mask = torch.tensor([True, True, True, False])
    result = clipped_value_loss(values, old, returns, mask, clip=clip)
    # Token 0: 0.7 is further from 2 than 1 is, so the held value counts and has no gradient.
    expected = [0.5 * (1.3**2 if clip else 1.0), 0.5, 0.5, 0.0]
    np.testing.assert_allclose(result.loss.detach().numpy(), expected, rtol=1e-6)
    result.loss.sum().backward()
    assert values.grad is not None
    np.testing.assert_allclose(values.grad.numpy(), [0.0 if clip else -1.0, 1.0, 1.0, 0.0], rtol=1e-6)


def policies() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, other = torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.log_softmax(0), other.log_softmax(0)


def test_kl_estimators_have_the_stated_means() -> None:
    _, policy, reference = policies()
    mask, weights = torch.ones(6, dtype=torch.bool), policy.exp()
    kl = (weights * (policy - reference)).sum().item()
    means = {
        name: (weights * kl_to_reference(policy, reference, mask, estimator=name)).sum().item()
        for name in ("k1", "k2", "k3")
    }
    assert means["k1"] == pytest.approx(kl) and means["k3"] == pytest.approx(kl)
    assert abs(means["k2"] - kl) > 0.01
    assert (kl_to_reference(policy, reference, mask, estimator="k3") >= 0).all()


def test_kl_estimators_have_the_stated_gradients() -> None:
    logits, policy, reference = policies()
    mask, weights = torch.ones(6, dtype=torch.bool), policy.detach().exp()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    as_loss = {
        name: gradient((weights * kl_to_reference(policy, reference, mask, estimator=name)).sum())
        for name in ("k1", "k2", "k3")
    }
    forward = gradient((policy.exp() * (policy - reference)).sum())
    backward = gradient((reference.exp() * (reference - policy)).sum())
    torch.testing.assert_close(as_loss["k1"], torch.zeros_like(forward))
    torch.testing.assert_close(as_loss["k2"], forward)
    torch.testing.assert_close(as_loss["k3"], backward)


def test_adaptive_kl_moves_towards_the_target_and_stays_there() -> None:
    controller = AdaptiveKlController(coefficient=0.2, target=6.0, horizon=100.0)
    assert controller.update(60.0, responses=50) == pytest.approx(0.2 * 1.1)
    assert controller.update(6.6, responses=50) == pytest.approx(0.22 * 1.05)
    assert controller.update(6.0, responses=50) == pytest.approx(0.231)
    assert controller.update(0.0, responses=100) == pytest.approx(0.231 * 0.8)
    # A policy whose KL falls as the coefficient rises ends at the target.
    for _ in range(400):
        controller.update(3.0 / controller.coefficient, responses=50)
    assert controller.coefficient == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(ValueError, match="horizon"):
        controller.update(6.0, responses=101)
    with pytest.raises(ValueError, match="above 0"):
        AdaptiveKlController(coefficient=0.2, target=0.0, horizon=100.0)
