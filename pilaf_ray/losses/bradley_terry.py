"""Fitting a reward model to pairs by maximum likelihood, and how well it fits.

Sides are ``a`` and ``b`` as planned; ``probability`` is P(a ≻ b) in [0, 1], a tie is ½.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pilaf_ray.losses.preference import LossOutputs


def bradley_terry_loss(
    reward_a: Float[Tensor, "pair"],
    reward_b: Float[Tensor, "pair"],
    probability: Float[Tensor, "pair"],
    *,
    centering: float = 0.0,
) -> LossOutputs:
    """−p·log σ(r_a − r_b) − (1 − p)·log σ(r_b − r_a), plus centering·(r_a + r_b)².

    Bradley and Terry 1952. Pairs leave a constant per prompt open; ``centering``
    (Eisenstein et al. 2023) pulls it towards 0, both sides of a pair alike.
    """
    margin = reward_a - reward_b
    loss = -probability * F.logsigmoid(margin) - (1.0 - probability) * F.logsigmoid(-margin)
    if centering:
        loss = loss + centering * (reward_a + reward_b).square()
    a_chosen = probability >= 0.5
    held = margin.detach()
    return LossOutputs(
        loss=loss,
        metrics={
            "accuracy": pair_accuracy(held, probability),
            "margin": torch.where(a_chosen, held, -held),
            "chosen_reward": torch.where(a_chosen, reward_a, reward_b).detach(),
            "rejected_reward": torch.where(a_chosen, reward_b, reward_a).detach(),
        },
    )


def bootstrapped_loss(
    rewards: Float[Tensor, "side head"],
    probability: Float[Tensor, "pair"],
    weights: Float[Tensor, "pair head"],
    *,
    centering: float = 0.0,
) -> Float[Tensor, "pair"]:
    """Mean over heads of each pair's :func:`bradley_terry_loss`, times how often the head's bootstrap drew the pair.

    Args:
        rewards: of side a and side b of each pair in turn.
        probability: P(a ≻ b) of each pair.
        weights: of each pair for each head; ones for a single head.
        centering: of :func:`bradley_terry_loss`.
    """
    losses = [
        bradley_terry_loss(a, b, probability, centering=centering).loss
        for a, b in zip(rewards[0::2].unbind(1), rewards[1::2].unbind(1), strict=True)
    ]
    return (torch.stack(losses, dim=1) * weights).mean(dim=1)


def pair_accuracy(margin: Float[Tensor, "pair"], probability: Float[Tensor, "pair"]) -> Float[Tensor, "pair"]:
    """1 where the sign of r_a − r_b agrees with the label, 0 where not, ½ for a tie of either."""
    return 0.5 * (1.0 + torch.sign(margin) * torch.sign(probability - 0.5))


def calibration_error(
    margin: Float[Tensor, "pair"], probability: Float[Tensor, "pair"], *, bins: int = 10
) -> Float[Tensor, ""]:
    """Expected calibration error of σ(margin): mean over pairs of |confidence − frequency| by bin.

    Seen from the side that the model prefers, so confidence lies in [½, 1] and swapping
    the sides of a pair changes nothing. ``bins`` share out [½, 1]. Soft labels count as
    frequencies. Guo et al. 2017. NaN for no pairs.

    Few pairs bias it upwards: with n pairs in a bin, by about 1/√n even for a perfect model.
    """
    # Imports transformers where that is installed: seconds that the losses do not need.
    from torchmetrics.functional.classification import binary_calibration_error

    if margin.numel() == 0:
        return margin.new_tensor(torch.nan)
    a_preferred = margin >= 0
    confidence = torch.sigmoid(margin.abs())
    label = torch.where(a_preferred, probability, 1.0 - probability)
    # The library's bins share out [0, 1]; soft labels fail its check for 0 or 1 but not its mean.
    return binary_calibration_error(2.0 * confidence - 1.0, 2.0 * label - 1.0, n_bins=bins, validate_args=False) / 2.0
