"""One network that computes as policy and as reference at once: adapters and caches belong to rows, weights to all.

The first rows of a forward pass are the policy's and get the adapters; the others are the reference's. What differs
between the two beside the adapters is what they have seen, so each attention layer has a cache for either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

from pilaf_ray.engines.lora import adapter_names
from pilaf_ray.errors import WeightSyncError


class RowSplit:
    """How many rows of the forward pass under way are the policy's: they come first."""

    policy_rows = 0


class TwoCaches(nn.Module):
    """In place of an attention layer: the policy's rows read and write one cache, the reference's another.

    Args:
        policy: vLLM's layer under the policy's name.
        reference: the same under the reference's.
        split: of the rows.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, split: RowSplit) -> None:
        super().__init__()
        self.policy, self.reference = policy, reference
        self._split = split

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        """Attention's output, (rows, heads · head size)."""
        rows = self._split.policy_rows
        found: Tensor
        if rows in (0, len(query)):
            found = (self.policy if rows else self.reference)(query, key, value, **settings)
            return found
        first = self.policy(query[:rows], key[:rows], value[:rows], **settings)
        second = self.reference(query[rows:], key[rows:], value[rows:], **settings)
        return torch.cat((first, second))


def share_attention(network: nn.Module, other: nn.Module, split: RowSplit) -> None:
    """Give each attention layer of ``network``, the reference's, the cache of its namesake in the policy as well."""
    twins = {name: layer for name, layer in other.named_modules() if isinstance(layer, Attention)}
    for name, twin in twins.items():
        parent, _, own = name.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, own, TwoCaches(twin, getattr(owner, own), split))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where the output of a layer as Hugging Face names it is found in vLLM's network, which fuses some."""

    layer: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One adapter of a layer of vLLM's."""

    start: int
    end: int
    a: Tensor
    """(rank, inputs)."""
    b: Tensor
    """(rank, outputs)."""


class RowAdapters:
    """Low-rank adapters beside a network's linear layers, for the policy's rows; none before the first update.

    Args:
        network: of vLLM's, on one worker.
        split: of the rows.
    """

    def __init__(self, network: nn.Module, split: RowSplit) -> None:
        self._split = split
        self._scale = 1.0
        self._layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LinearBase)}
        self._places = _places(self._layers, getattr(network, "packed_modules_mapping", {}))
        self._parts: dict[LinearBase, tuple[Tensor, list[_Part]]] = {}
        for layer in self._layers.values():
            layer.register_forward_hook(self._add)

    @property
    def adaptable(self) -> frozenset[str]:
        """The linear layers, by the names that they have where nothing is fused."""
        return frozenset(self._places)

    def replace(self, adapters: Mapping[str, Tensor], *, scale: float) -> None:
        """Serve these instead.

        Args:
            adapters: every A and B, named as :func:`pilaf_ray.engines.lora.adapter_parameters` does.
            scale: alpha/rank.

        Raises:
            WeightSyncError: one belongs to no layer of the network or does not fit its sizes; nothing is changed then.
        """
        parts: dict[LinearBase, list[_Part]] = {}
        for stem, (a, b) in adapter_names(adapters).items():
            place = self._places.get(stem)
            if place is None:
                raise WeightSyncError(
                    f"adapter tensors fit no weight of the reference, e.g. {stem}: "
                    "they were trained on another model than the one that generators serve"
                )
            layer = self._layers[place.layer]
            _check_sizes(stem, adapters[a], adapters[b], inputs=layer.input_size, outputs=place.end - place.start)
            part = _Part(start=place.start, end=place.end, a=adapters[a], b=adapters[b].T.contiguous())
            parts.setdefault(layer, []).append(part)
        self._parts = {layer: (torch.cat([part.a for part in some]).T, some) for layer, some in parts.items()}
        self._scale = scale

    def _add(self, layer: nn.Module, inputs: Sequence[Tensor], output: Any) -> None:
        """scale · B·(A·x) onto the policy's rows of what the layer gave, in place."""
        rows = self._split.policy_rows
        found = self._parts.get(layer) if rows else None  # type: ignore[call-overload]  # a layer, as registered
        if found is None:
            return
        first, parts = found
        whole = output[0] if isinstance(output, tuple) else output
        low, start = inputs[0][:rows] @ first, 0
        for part in parts:
            rank = len(part.a)
            whole[:rows, part.start : part.end].addmm_(low[:, start : start + rank], part.b, alpha=self._scale)
            start += rank


def _check_sizes(stem: str, a: Tensor, b: Tensor, *, inputs: int, outputs: int) -> None:
    if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0]) != (inputs, outputs) or len(a) != b.shape[1]:
        raise WeightSyncError(
            f"the adapter of {stem} has sizes {tuple(a.shape)} and {tuple(b.shape)}, but the layer takes {inputs} and "
            f"gives {outputs}: it was trained on another model than the one that generators serve"
        )


def _places(layers: Mapping[str, LinearBase], packed: Mapping[str, Sequence[str]]) -> dict[str, _Place]:
    """By the names that the layers have where nothing is fused."""
    places = {}
    for name, layer in layers.items():
        parent, dot, own = name.rpartition(".")
        names = packed.get(own, (own,))
        sizes = getattr(layer, "output_sizes", None) if len(names) > 1 else [layer.output_size]
        if sizes is None or len(sizes) != len(names):
            continue
        start = 0
        for part, size in zip(names, sizes, strict=True):
            places[f"{parent}{dot}{part}"] = _Place(layer=name, start=start, end=start + size)
            start += size
    return places
