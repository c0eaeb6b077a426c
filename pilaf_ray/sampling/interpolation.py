"""Mixing two networks' logits, and what the mixing tells for free."""

import torch
from jaxtyping import Float
from torch import Tensor


def mix_logits(
    policy: Float[Tensor, "*batch vocab"], reference: Float[Tensor, "*batch vocab"], coefficient: float
) -> Float[Tensor, "*batch vocab"]:
    """(1 + c)·policy − c·reference in fp32, on entries where both are finite.

    An entry that either network forbids (−inf: a mask, a padded vocabulary row)
    stays forbidden; mixing it would give NaN.
    """
    policy, reference = policy.float(), reference.float()
    mixed = (1.0 + coefficient) * policy - coefficient * reference
    return torch.where(torch.isfinite(policy) & torch.isfinite(reference), mixed, -torch.inf)


def mixed_logprobs(
    policy: Float[Tensor, "*batch vocab"], reference: Float[Tensor, "*batch vocab"], coefficient: float
) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities of the mixed distribution at temperature 1."""
    return torch.log_softmax(mix_logits(policy, reference, coefficient), dim=-1)


def log_z(
    policy: Float[Tensor, "*batch vocab"], reference: Float[Tensor, "*batch vocab"], coefficient: float
) -> Float[Tensor, "*batch"]:
    """log Z_t = logsumexp((1 + c)·log π − c·log π_ref), the normaliser at one position.

    Along a response y drawn with coefficient ±β, π(y)·exp(±r(y)) = q(y)·∏_t Z_t,
    with r = β·log(π/π_ref): so ∏_t Z_t is an unbiased estimate of E_π[exp(±r)].
    """
    mixed = mix_logits(torch.log_softmax(policy, -1), torch.log_softmax(reference, -1), coefficient)
    return torch.logsumexp(mixed, dim=-1)
