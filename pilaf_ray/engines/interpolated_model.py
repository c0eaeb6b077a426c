"""Policy and reference as one vLLM model, so that one engine decodes from their mixture.

Two instances of the same architecture live under the prefixes ``policy`` and
``reference``. Both see the same tokens and positions; their attention layers have
separate KV caches in the same block tables, so continuous batching and preemption
need no change. Requests with coefficient 0 skip the reference where the platform
allows it, so their blocks hold no reference KV: mixed and plain requests must not
share cached prefixes, which :class:`pilaf_ray.engines.generator.Generator` sees to.

The wrapper works for any text decoder that vLLM serves: the architecture it replaces
travels in the model's config.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import init_vllm_registered_model

from pilaf_ray.engines.reference_shelf import POLICY, REFERENCE, ReferenceShelf
from pilaf_ray.engines.row_routing import forward_rows, routable_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ARCHITECTURE_KEY = "pilaf_architecture"
REFERENCE_KEY = "pilaf_reference_path"


class InterpolatedForCausalLM(nn.Module):
    """Chosen by ``hf_overrides`` in :class:`pilaf_ray.engines.generator.Generator`."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        architectures = [getattr(config, ARCHITECTURE_KEY)]
        self.policy: Any = init_vllm_registered_model(vllm_config, prefix=POLICY, architectures=architectures)
        self.reference: Any = init_vllm_registered_model(vllm_config, prefix=REFERENCE, architectures=architectures)
        self.policy_parameters: frozenset[str] = frozenset()
        self.secondary_weights = [
            DefaultModelLoader.Source(
                model_or_path=getattr(config, REFERENCE_KEY), revision=None, prefix=f"{REFERENCE}."
            )
        ]
        self.shelf = ReferenceShelf.of(vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Refused: the two halves embed differently, so tokens must reach :meth:`forward`."""
        raise NotImplementedError("an interpolated model takes token ids, not embeddings")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Hidden states (tokens, 2·hidden): the policy's, then the reference's."""
        if intermediate_tensors is not None or inputs_embeds is not None:
            raise NotImplementedError("an interpolated model has no pipeline stages and takes token ids")
        return torch.cat(self._states(input_ids, positions), dim=-1)

    def _states(self, input_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (tokens, hidden) of policy and reference."""
        policy = self.policy(input_ids, positions)
        return policy, self._reference_states(input_ids, positions, like=policy)

    def _reference_states(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *, like: torch.Tensor
    ) -> torch.Tensor:
        """The reference's hidden states; where requests can be told apart, those of mixed ones only."""
        if self.shelf.deferred:
            return torch.zeros_like(like)
        rows = self.shelf.mixed_rows
        # No layer is routable in vLLM's rehearsals of a large batch either: there both halves must run.
        layers = routable_layers(get_forward_context(), REFERENCE)
        if not layers:
            states: torch.Tensor = self.reference(input_ids, positions)
            return states
        if not rows:
            return torch.zeros_like(like)
        return forward_rows(self.reference, input_ids, positions, rows=rows, layers=layers)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The policy's logits, (rows, vocab); the reference's of mixed rows go to the shelf.

        The first call after a forward pass is for sampling, with a row a request. Later ones
        are for log-probabilities of prompts, which are the policy's own and are made here, because the
        engine hands on what it gets (``logprobs_mode`` of the generator).
        """
        policy_states, reference_states = hidden_states.chunk(2, dim=-1)
        rows = self.shelf.claim_rows()
        if rows:
            logits, reference = self._logits(policy_states, reference_states[list(rows)])
            if reference is not None:
                self.shelf.put(reference)
            return logits
        plain: torch.Tensor | None = self.policy.compute_logits(policy_states.contiguous())
        return plain if rows is not None or plain is None else plain.log_softmax(-1, dtype=torch.float32)

    def _logits(self, policy: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (rows, vocab) of both from states (rows, hidden)."""
        return self.policy.compute_logits(policy.contiguous()), self.reference.compute_logits(reference)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load both checkpoints; the loader yields the reference's names with its prefix."""
        loaded: set[str] = set()
        for is_reference, group in groupby(weights, key=lambda item: item[0].startswith(f"{REFERENCE}.")):
            side = REFERENCE if is_reference else POLICY
            names = getattr(self, side).load_weights(_without_prefix(group, is_reference=is_reference))
            if not is_reference:
                self.policy_parameters |= frozenset(names)
            loaded.update(f"{side}.{name}" for name in names)
        return loaded


def _without_prefix(
    weights: Iterable[tuple[str, torch.Tensor]], *, is_reference: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        yield (name.removeprefix(f"{REFERENCE}.") if is_reference else name), tensor
