"""Advantages of sampled responses. Pure tensor functions.

Group estimators take one reward a response, the responses of a prompt next to each
other; GAE works on tokens. Formulas: docs/algorithms.md.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def leave_one_out_advantages(rewards: Float[Tensor, "response"], *, group_size: int) -> Float[Tensor, "response"]:
    """Reward minus the mean of the *other* responses to the same prompt (RLOO).

    Kool et al. 2019, Ahmadian et al. 2024. A group of identical rewards gives zeros.

    Raises:
        ValueError: ``group_size`` is below 2 or does not divide the number of rewards.
    """
    # (r − mean)·k/(k − 1) equals r − mean of the others.
    return (_centred(rewards, group_size) * (group_size / (group_size - 1))).flatten()


def group_relative_advantages(
    rewards: Float[Tensor, "response"], *, group_size: int, scale: bool = True, epsilon: float = 1e-4
) -> Float[Tensor, "response"]:
    """(r − group mean)/(group standard deviation + ε) (GRPO, Shao et al. 2024).

    Without ``scale`` only the mean is taken off (Dr. GRPO, Liu et al. 2025). The
    deviation has k − 1 in its denominator. A group of identical rewards gives zeros.

    Raises:
        ValueError: as for `leave_one_out_advantages`.
    """
    centred = _centred(rewards, group_size)
    if scale:
        deviation = (centred.square().sum(dim=1, keepdim=True) / (group_size - 1)).sqrt()
        centred = centred / (deviation + epsilon)
    return centred.flatten()


def _centred(rewards: Float[Tensor, "response"], group_size: int) -> Float[Tensor, "prompt group"]:
    """Rewards minus their group's mean; exactly 0 where all are the same."""
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not form groups of {group_size}; a group has 2 or more")
    groups = rewards.view(-1, group_size)
    # A mean of identical floats may be off by one bit; differences to the first are not.
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(dim=1, keepdim=True)


def token_rewards(
    scores: Float[Tensor, "response"],
    kl: Float[Tensor, "response token"],
    mask: Bool[Tensor, "response token"],
    *,
    kl_coefficient: float,
    score_clip: float | None = None,
) -> Float[Tensor, "response token"]:
    """−coefficient·KL at each token, and the response's score at its last token.

    Ziegler et al. 2019. ``score_clip`` bounds |score| here, where the policy uses it;
    the reward model keeps being trained on its own scale.

    Raises:
        ValueError: a response without a token.
    """
    lengths = mask.sum(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError("a response without a token cannot carry its score")
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    rewards = torch.where(mask, -kl_coefficient * kl, 0.0)
    # With the mask's last True, left padding works as well as right padding.
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


@dataclass(frozen=True, kw_only=True)
class AdvantagesAndReturns:
    """What the policy climbs and what the value model is fitted to; 0 outside the mask."""

    advantages: Float[Tensor, "response token"]
    returns: Float[Tensor, "response token"]


def generalized_advantages(
    rewards: Float[Tensor, "response token"],
    values: Float[Tensor, "response token"],
    mask: Bool[Tensor, "response token"],
    *,
    discount: float = 1.0,
    trace_decay: float = 0.95,
) -> AdvantagesAndReturns:
    """A_t = Σ_k (γλ)^k·δ_{t+k}, δ_t = r_t + γ·V_{t+1} − V_t (GAE, Schulman et al. 2016).

    The episode ends with the last token of the mask, also where the length limit cut
    the response: nothing is bootstrapped there. The mask of a response has no gap.

    Args:
        rewards: from `token_rewards`.
        values: V at the state *before* each token, without gradient.
        mask: response tokens.
        discount: γ.
        trace_decay: λ.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(running)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * following - values[:, t]
        running = torch.where(mask[:, t], delta + discount * trace_decay * running, 0.0)
        advantages[:, t] = running
        following = values[:, t]
    return AdvantagesAndReturns(advantages=advantages, returns=torch.where(mask, advantages + values, 0.0))


def masked_moments(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "3"]:
    """Count, sum and sum of squares in float64; ranks add theirs up before `whiten`."""
    chosen = values[mask].double()
    return torch.stack([chosen.new_tensor(float(chosen.numel())), chosen.sum(), chosen.square().sum()])


def whiten(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    moments: Float[Tensor, "3"] | None = None,
    epsilon: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Values at unit variance (and, with ``shift_mean``, zero mean) over the mask; 0 outside.

    Args:
        values: advantages, or rewards.
        mask: entries that count.
        shift_mean: False keeps the mean, as rewards need it.
        moments: of all ranks together; from this tensor alone when left out.
        epsilon: added to the variance, so that constant values give zeros.
    """
    count, total, squares = masked_moments(values, mask) if moments is None else moments
    mean = total / count.clamp(min=1.0)
    variance = (squares - count * mean.square()).clamp(min=0.0) / (count - 1.0).clamp(min=1.0)
    whitened = (values.double() - mean) * torch.rsqrt(variance + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(values.dtype)
