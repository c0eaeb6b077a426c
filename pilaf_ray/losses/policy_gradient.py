"""Policy-gradient losses per response token. Pure tensor functions.

Three policies meet here. *Behaviour* sampled the tokens, maybe some versions ago;
*old* is the learner at the start of its optimiser step; the one being trained has the
gradient. Formulas: docs/algorithms.md.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token_mean", "response_mean", "response_sum"]


@dataclass(frozen=True, kw_only=True)
class PolicyGradientInputs:
    """Log-probabilities of sampled tokens, each under several policies; any shape."""

    logprobs: Float[Tensor, "*token"]
    """Under the policy being trained, with gradient."""
    old_logprobs: Float[Tensor, "*token"]
    """Under the learner at the start of the step, the centre of the clipping."""
    advantages: Float[Tensor, "*token"]
    """One a token; group advantages are repeated over their response."""
    mask: Bool[Tensor, "*token"]
    """Response tokens; what the other fields hold elsewhere is never read."""
    behaviour_logprobs: Float[Tensor, "*token"] | None = None
    """As reported by the generator; None where it is the old policy itself."""


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """Loss and metrics a token, 0 outside the mask, so that callers choose the reduction."""

    loss: Float[Tensor, "*token"]
    metrics: dict[str, Tensor]


def clipped_surrogate(
    inputs: PolicyGradientInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, importance_cap: float | None = None
) -> TokenLoss:
    """−w·min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A), ρ = π/π_old, w = min(π_old/μ, cap).

    PPO (Schulman et al. 2017). w corrects for a stale behaviour policy μ and carries no
    gradient; truncation as in IMPALA (Espeholt et al. 2018). Without
    ``behaviour_logprobs`` w is 1.

    Raises:
        ValueError: ``behaviour_logprobs`` are given without a cap, or a cap without them.
    """
    mask = inputs.mask
    ratio = _log_ratio(inputs.logprobs, inputs.old_logprobs, mask).exp()
    advantages = torch.where(mask, inputs.advantages, 0.0)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {
        "ratio": torch.where(mask, ratio.detach(), 0.0),
        "clipped": (clipped * advantages < ratio * advantages).to(ratio.dtype),
    }
    if (inputs.behaviour_logprobs is None) != (importance_cap is None):
        raise ValueError("importance_cap and behaviour_logprobs come together or not at all")
    if inputs.behaviour_logprobs is not None and importance_cap is not None:
        weight = truncated_importance_weights(inputs.old_logprobs, inputs.behaviour_logprobs, mask, cap=importance_cap)
        loss = loss * weight
        metrics["importance_weight"] = torch.where(mask, weight, 0.0)
        metrics["truncated"] = (mask & (weight >= importance_cap)).to(ratio.dtype)
    return TokenLoss(loss=torch.where(mask, loss, 0.0), metrics=metrics)


def truncated_importance_weights(
    old_logprobs: Float[Tensor, "*token"],
    behaviour_logprobs: Float[Tensor, "*token"],
    mask: Bool[Tensor, "*token"],
    *,
    cap: float,
) -> Float[Tensor, "*token"]:
    """min(π_old/μ, cap) a token, without gradient; 1 outside the mask.

    Raises:
        ValueError: the cap is below 1, so that even fresh tokens would be weighted down.
    """
    if cap < 1.0:
        raise ValueError(f"importance cap {cap} is below 1")
    # The bound before exp(): a token that μ found impossible gives the cap, not inf.
    return _log_ratio(old_logprobs, behaviour_logprobs, mask).detach().clamp(max=math.log(cap)).exp().clamp(max=cap)


def clipped_value_loss(
    values: Float[Tensor, "*token"],
    old_values: Float[Tensor, "*token"],
    returns: Float[Tensor, "*token"],
    mask: Bool[Tensor, "*token"],
    *,
    clip: float | None = 0.2,
) -> TokenLoss:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²); plain ½(V − R)² without ``clip``.

    The clipping is of PPO's reference code (Dhariwal et al. 2017), not of its paper.
    """
    values, old_values = torch.where(mask, values, 0.0), torch.where(mask, old_values, 0.0)
    returns = torch.where(mask, returns, 0.0)
    plain = (values - returns).square()
    if clip is None:
        return TokenLoss(loss=0.5 * plain, metrics={})
    held = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return TokenLoss(loss=0.5 * torch.maximum(plain, held), metrics={"value_clipped": (held > plain).to(values.dtype)})


def kl_to_reference(
    logprobs: Float[Tensor, "*token"],
    reference_logprobs: Float[Tensor, "*token"],
    mask: Bool[Tensor, "*token"],
    *,
    estimator: KlEstimator,
) -> Float[Tensor, "*token"]:
    """KL(π ‖ π_ref) estimated at each token sampled from π; 0 outside the mask.

    With d = log π − log π_ref (Schulman 2020): k1 = d, unbiased, may be negative; k2 = d²/2,
    biased; k3 = exp(−d) + d − 1, unbiased and never negative. As a *loss* on samples from π,
    k1 has a gradient of mean zero, k2 that of the KL, k3 that of the KL the other way
    round: so k1 belongs into the reward.
    """
    difference = _log_ratio(logprobs, reference_logprobs, mask)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.expm1(-difference) + difference


def aggregate(
    loss: Float[Tensor, "response token"], mask: Bool[Tensor, "response token"], *, how: Aggregation
) -> Float[Tensor, ""]:
    """A batch's scalar from its tokens.

    ``token_mean``: every token counts the same. ``response_mean``: mean over the tokens of
    a response, then over responses (GRPO). ``response_sum``: sum over the tokens, mean over
    responses, the gradient of the expected reward (RLOO). Nothing in the mask gives 0.
    """
    held = torch.where(mask, loss, 0.0)
    if how == "token_mean":
        return held.sum() / mask.sum().clamp(min=1)
    per_response = held.sum(dim=1)
    if how == "response_mean":
        per_response = per_response / mask.sum(dim=1).clamp(min=1)
    return per_response.sum() / max(mask.shape[0], 1)


def _log_ratio(
    numerator: Float[Tensor, "*token"], denominator: Float[Tensor, "*token"], mask: Bool[Tensor, "*token"]
) -> Float[Tensor, "*token"]:
    """Difference on the mask, 0 elsewhere; selected first, so padding has no NaN gradient."""
    return torch.where(mask, numerator, 0.0) - torch.where(mask, denominator, 0.0)


@dataclass(kw_only=True)
class AdaptiveKlController:
    """Moves the KL coefficient so that the measured KL stays near a target.

    coefficient ← coefficient·(1 + clip(KL/target − 1, ±0.2)·responses/horizon), Ziegler
    et al. 2019, section 2.2. All state is ``coefficient``: a checkpoint saves that number.
    """

    coefficient: float
    target: float
    """KL of a whole response, in nats."""
    horizon: float
    """Responses over which a KL 20 % off target, or further, moves the coefficient by about 20 %."""

    def __post_init__(self) -> None:
        """Refuse what cannot be controlled."""
        if min(self.coefficient, self.target, self.horizon) <= 0:
            raise ValueError("adaptive KL: coefficient, target and horizon are above 0")

    def update(self, kl: float, *, responses: int) -> float:
        """The new coefficient after a batch with mean sequence KL ``kl``.

        Raises:
            ValueError: the batch is longer than the horizon.
        """
        if responses > self.horizon:
            raise ValueError(f"adaptive KL: a batch of {responses} responses is longer than horizon {self.horizon}")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * responses / self.horizon
        return self.coefficient
