"""Whether a model may score all responses to a prompt behind one forward of the prompt."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.data.collate import ResponseGroup, SequenceBatch, collate, collate_shared
from pilaf_ray.engines.sequence_checks import attends_to_all

logger = logging.getLogger(__name__)

_PROBE: ResponseGroup = ((3, 1, 4, 1, 5), ((9, 2, 6), (5, 3)))


def takes_masks(network: nn.Module) -> bool:
    """Whether ``network`` obeys a mask and positions of our own in all its layers."""
    model: Any = network
    config = model.config.get_text_config()
    return (
        attends_to_all(config)
        and config._attn_implementation.startswith(("sdpa", "eager", "ulysses"))
        and "position_ids" in inspect.signature(model.base_model.forward).parameters
    )


@torch.no_grad()
def shares_prompts(network: nn.Module, score: Callable[[SequenceBatch], Tensor], *, device: torch.device) -> bool:
    """Whether shared rows give the log-probabilities of separate ones, seen on a small example.

    Args:
        network: the Hugging Face model.
        score: per-token log-probabilities of a batch, by ``network``.
        device: where batches must be.
    """
    if not takes_masks(network):
        return False
    prompt, responses = _PROBE
    apart = score(collate([(prompt, response) for response in responses]).to(device))
    shared = score(collate_shared([_PROBE]).to(device))
    # Rounding of bf16 is two decimals; a mask that is not obeyed moves log-probabilities by whole units.
    exact = next(network.parameters()).dtype is torch.float32
    same = torch.allclose(apart, shared, atol=1e-4 if exact else 0.1, rtol=0)
    if not same:
        logger.warning("prompts are not shared between responses: the model does not obey a mask of its own")
    return same
