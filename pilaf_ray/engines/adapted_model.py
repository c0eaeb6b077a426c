"""A policy that is its reference and adapters: both halves of the interpolated model share one set of weights.

::

    a step's tokens ────────────────┐
    those of its mixed requests ────┴▶ one pass of the base ─▶ policy's states (with adapters, from its own cache),
                                                               reference's states (from the reference's)

Weights are in memory once, and a step reads them once, where
:class:`pilaf_ray.engines.interpolated_model.InterpolatedForCausalLM` has two networks, one after the other.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context

from pilaf_ray.engines.adapted_layers import RowAdapters, RowSplit, share_attention
from pilaf_ray.engines.interpolated_model import InterpolatedForCausalLM
from pilaf_ray.engines.reference_shelf import REFERENCE
from pilaf_ray.engines.row_routing import narrow_plans, routable_layers
from pilaf_ray.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class AdaptedForCausalLM(InterpolatedForCausalLM):
    """Chosen by ``hf_overrides`` in :mod:`pilaf_ray.engines.engine_arguments`, where adapters are trained."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.split = RowSplit()
        # Of the policy's network only the caches are kept: its weights were never filled.
        share_attention(self.reference, self.policy, self.split)
        self.base = self.reference
        del self.policy, self.reference
        self.policy = _Side(self.base, self.split, adapted=True)
        self.reference = _Side(self.base, self.split, adapted=False)
        self.adapters = RowAdapters(self.base, self.split)
        # The model folder is the reference's already.
        self.secondary_weights = []

    def _states(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        context = get_forward_context()
        layers = routable_layers(context, REFERENCE)
        rows = self.shelf.mixed_rows
        if self.shelf.deferred or (layers and not rows):
            policy = self.policy(input_ids, positions)
            return policy, torch.zeros_like(policy)
        if not layers:
            return self._together(input_ids, positions, torch.arange(len(input_ids)))
        tokens, plans, slots = narrow_plans(rows, layers)
        with override_forward_context(_also(context, plans, slots)):
            return self._together(input_ids, positions, tokens)

    def _together(self, input_ids: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's states of all tokens and the reference's of ``tokens``, by one pass."""
        count = self.split.policy_rows = len(input_ids)
        both = self.base(torch.cat((input_ids, input_ids[tokens])), torch.cat((positions, positions[tokens])))
        reference = torch.zeros_like(both[:count])
        reference[tokens] = both[count:]
        return both[:count], reference

    def _logits(self, policy: Tensor, reference: Tensor) -> tuple[Tensor | None, Tensor | None]:
        both = self.base.compute_logits(torch.cat((policy, reference)))
        return (None, None) if both is None else (both[: len(policy)], both[len(policy) :])

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the one checkpoint.

        Raises:
            ConfigError: its layers are named otherwise than the network's, so that adapters could not be placed.
        """
        names: set[str] = set()

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                names.add(name.removesuffix(".weight"))
                yield name, tensor

        loaded = {f"base.{name}" for name in self.base.load_weights(noted())}
        if strange := self.adapters.adaptable - names:
            raise ConfigError(
                f"vLLM names layers of this architecture otherwise than its files ({min(strange)}), so adapters "
                "cannot be placed in a shared base: set generation.share_base: false"
            )
        return loaded


class _Side:
    """The shared network as one of the two."""

    def __init__(self, base: Any, split: RowSplit, *, adapted: bool) -> None:
        self._base, self._split, self._adapted = base, split, adapted

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        self._split.policy_rows = len(input_ids) if self._adapted else 0
        states: Tensor = self._base(input_ids, positions)
        return states

    def compute_logits(self, states: Tensor) -> Tensor | None:
        logits: Tensor | None = self._base.compute_logits(states)
        return logits


def _also(context: ForwardContext, plans: dict[str, Any], slots: dict[str, Tensor]) -> ForwardContext:
    """The step's context with other plans for some layers."""
    known_plans: Any = context.attn_metadata
    known_slots: Any = context.slot_mapping
    return replace(context, attn_metadata={**known_plans, **plans}, slot_mapping={**known_slots, **slots})
