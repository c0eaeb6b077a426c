"""What a batch of scored rollouts asks of policy and value model. Pure tensor functions.

Rows are responses, those of one prompt next to each other; columns are response tokens,
padded on the right. Formulas: docs/algorithms.md.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pilaf_ray.losses.advantages import (
    generalized_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    token_rewards,
    whiten,
)
from pilaf_ray.losses.policy_gradient import Aggregation, kl_to_reference


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """Scored responses as tensors."""

    scores: Float[Tensor, "response"]
    """r̂."""
    behaviour_logprobs: Float[Tensor, "response token"]
    """Of the policy that sampled."""
    reference_logprobs: Float[Tensor, "response token"]
    mask: Bool[Tensor, "response token"]
    values: Float[Tensor, "response token"] | None = None
    """V before each token, for PPO."""


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How advantages are made."""

    kind: Literal["ppo", "rloo", "grpo"]
    group_size: int
    kl_in_reward: bool
    score_clip: float | None = None
    scale: bool = True
    """GRPO: divide by the group's standard deviation."""
    discount: float = 1.0
    trace_decay: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = False


@dataclass(frozen=True, kw_only=True)
class RolloutTargets:
    """Advantages for the policy and returns for the value model; 0 outside the mask."""

    advantages: Float[Tensor, "response token"]
    returns: Float[Tensor, "response token"] | None
    sequence_kl: Float[Tensor, "response"]
    """Σ_t log μ − log π_ref of each response, μ the policy that sampled it."""


def rollout_targets(batch: RolloutBatch, settings: AdvantageSettings, *, kl_coefficient: float) -> RolloutTargets:
    """Advantages by ``settings.kind``; KL, where it is in the reward, as k1 of the policy that sampled.

    The groups of RLOO and GRPO compare whole responses: r̂ − coefficient·Σ_t KL_t.
    """
    mask = batch.mask
    kl = kl_to_reference(batch.behaviour_logprobs, batch.reference_logprobs, mask, estimator="k1")
    coefficient = kl_coefficient if settings.kl_in_reward else 0.0
    rewards = token_rewards(batch.scores, kl, mask, kl_coefficient=coefficient, score_clip=settings.score_clip)
    returns: Tensor | None = None
    if settings.kind == "ppo":
        assert batch.values is not None, "PPO's advantages need values"
        if settings.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        found = generalized_advantages(
            rewards, batch.values, mask, discount=settings.discount, trace_decay=settings.trace_decay
        )
        advantages, returns = found.advantages, found.returns
    else:
        whole = rewards.sum(dim=1)
        if settings.kind == "rloo":
            each = leave_one_out_advantages(whole, group_size=settings.group_size)
        else:
            each = group_relative_advantages(whole, group_size=settings.group_size, scale=settings.scale)
        advantages = torch.where(mask, each[:, None], 0.0)
    if settings.whiten_advantages:
        advantages = whiten(advantages, mask)
    return RolloutTargets(advantages=advantages, returns=returns, sequence_kl=kl.sum(dim=1))


def token_weights(mask: Bool[Tensor, "response token"], *, how: Aggregation) -> Float[Tensor, "response token"]:
    """Weights with which token losses add up to :func:`pilaf_ray.losses.policy_gradient.aggregate` of them.

    Micro-batches of a batch can then be summed one by one.
    """
    weights = mask.to(torch.float32)
    if how == "token_mean":
        return weights / weights.sum().clamp(min=1.0)
    if how == "response_mean":
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0)
    return weights / max(mask.shape[0], 1)
