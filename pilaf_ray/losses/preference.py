"""Preference losses on sequence log-probabilities. Pure tensor functions.

Sides are ``a`` and ``b`` as planned; ``probability`` is P(a ≻ b) in [0, 1], so hard
labels, soft labels and ties (½) share one formula. Formulas: docs/algorithms.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PreferenceInputs:
    """Sequence log-probabilities (sums over response tokens) of a batch of pairs."""

    policy_a: Float[Tensor, "pair"]
    policy_b: Float[Tensor, "pair"]
    reference_a: Float[Tensor, "pair"]
    reference_b: Float[Tensor, "pair"]
    length_a: Float[Tensor, "pair"]
    """Number of response tokens of side a."""
    length_b: Float[Tensor, "pair"]
    probability: Float[Tensor, "pair"]
    weight: Float[Tensor, "pair"] | None = None
    """Factor of each pair's loss, as the sampler asks for it; 1 when left out. Metrics are not weighted."""

    def weighted(self, loss: Float[Tensor, "pair"]) -> Float[Tensor, "pair"]:
        """The loss times the weight."""
        return loss if self.weight is None else loss * self.weight


@dataclass(frozen=True, kw_only=True)
class LossOutputs:
    """Per-pair loss and per-pair metrics, so that callers choose the reduction."""

    loss: Float[Tensor, "pair"]
    metrics: dict[str, Tensor]


def dpo_loss(inputs: PreferenceInputs, *, beta: float, label_smoothing: float = 0.0) -> LossOutputs:
    """−p'·log σ(m) − (1 − p')·log σ(−m), m = β·(Δ_θ − Δ_ref), p' = p(1 − ε) + (1 − p)ε.

    Rafailov et al. 2023; the smoothing is conservative DPO (Mitchell 2023).
    """
    reward_a = beta * (inputs.policy_a - inputs.reference_a)
    reward_b = beta * (inputs.policy_b - inputs.reference_b)
    margin = reward_a - reward_b
    p = inputs.probability * (1.0 - label_smoothing) + (1.0 - inputs.probability) * label_smoothing
    loss = -p * F.logsigmoid(margin) - (1.0 - p) * F.logsigmoid(-margin)
    return LossOutputs(loss=inputs.weighted(loss), metrics=_metrics(inputs, reward_a.detach(), reward_b.detach()))


def ipo_loss(inputs: PreferenceInputs, *, beta: float, label_smoothing: float = 0.0) -> LossOutputs:
    """p·(h − 1/2β)² + (1 − p)·(−h − 1/2β)², h = Δ_θ − Δ_ref with per-token means.

    Azar et al. 2023, with the averaging of its authors' erratum. ``label_smoothing``
    is part of the common signature and must be 0.
    """
    assert label_smoothing == 0.0, "ipo has no label smoothing"
    h = (inputs.policy_a - inputs.reference_a) / inputs.length_a
    h = h - (inputs.policy_b - inputs.reference_b) / inputs.length_b
    target = 1.0 / (2.0 * beta)
    p = inputs.probability
    loss = p * (h - target) ** 2 + (1.0 - p) * (h + target) ** 2
    reward_a = beta * (inputs.policy_a - inputs.reference_a).detach()
    reward_b = beta * (inputs.policy_b - inputs.reference_b).detach()
    return LossOutputs(loss=inputs.weighted(loss), metrics=_metrics(inputs, reward_a, reward_b))


def _metrics(
    inputs: PreferenceInputs, reward_a: Float[Tensor, "pair"], reward_b: Float[Tensor, "pair"]
) -> dict[str, Tensor]:
    """Per-pair values seen from the chosen side; a tie counts half on accuracy."""
    a_chosen = inputs.probability >= 0.5
    policy_a, policy_b = inputs.policy_a.detach(), inputs.policy_b.detach()
    chosen = torch.where(a_chosen, reward_a, reward_b)
    rejected = torch.where(a_chosen, reward_b, reward_a)
    tie = inputs.probability == 0.5
    agrees = torch.where(tie, torch.full_like(chosen, 0.5), (chosen > rejected).float())
    return {
        "margin": chosen - rejected,
        "accuracy": agrees,
        "chosen_logprob": torch.where(a_chosen, policy_a, policy_b),
        "rejected_logprob": torch.where(a_chosen, policy_b, policy_a),
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


LOSSES: dict[str, Callable[..., LossOutputs]] = {"dpo": dpo_loss, "ipo": ipo_loss}
