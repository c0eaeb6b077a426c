"""A learner that leaves its device to others for a while: every tensor's memory goes to the host, and comes back.

DeepSpeed has ``offload_states`` for this, which takes its own CUDA optimizer only; ours is PyTorch's. So memory is
moved below the tensors: a storage is copied to the host and emptied, and everything that looks into it (a weight, the
flat buffer that it is part of, a gradient) stays what it is. That holds under every ZeRO stage, and on CPUs, where the
copy is no smaller than what it is made of.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DEPTH = 4
"""Lists of lists of tensors are as deep as DeepSpeed keeps them."""


class ParkedStates:
    """What of an engine's states is away from its device.

    Args:
        engine: of DeepSpeed, between two steps.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._kept: dict[int, Tensor] = {}

    @property
    def is_away(self) -> bool:
        """Whether the states are on the host."""
        return bool(self._away)

    def rest(self) -> int:
        """Move them to the host; returns how many bytes the device has got back. Harmless when repeated."""
        if self._away:
            return 0
        _synchronise()
        freed = 0
        # Several tensors look into one storage: at the second it is empty.
        for storage in self._storages():
            copy = self._room(storage.nbytes())
            copy.copy_(_bytes(storage))
            freed += storage.nbytes()
            storage.resize_(0)
            self._away.append((storage, copy))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return freed

    def resume(self) -> None:
        """Bring them back. Harmless when repeated."""
        for storage, copy in self._away:
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy)
            if copy.is_pinned():
                # Pinning is slow, and sizes are the same at each turn.
                self._kept[id(copy)] = copy
        _synchronise()
        self._away = []

    def _room(self, size: int) -> Tensor:
        for key, copy in self._kept.items():
            if copy.numel() == size:
                return self._kept.pop(key)
        return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Memory of the device that states lie in; but for what is not ours to free, such as mapped files."""
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            if tensor.device == self._engine.device and storage.nbytes() and storage.resizable():
                yield storage

    def _tensors(self) -> Iterator[Tensor]:
        for parameter in self._engine.module.parameters():
            yield parameter.data
            if parameter.grad is not None:
                yield parameter.grad
            # ZeRO-3's part of it, and that of hybrid sharding.
            yield from _inside([getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor")])
        yield from self._engine.module.buffers()
        optimizer = self._engine.optimizer
        while optimizer is not None:
            yield from _inside(vars(optimizer))
            # DeepSpeed's wraps the one that takes the step.
            optimizer = vars(optimizer).get("optimizer")


def _inside(value: object, depth: int = DEPTH) -> Iterator[Tensor]:
    """Tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple | set):
        inner: Iterable[object] = value.values() if isinstance(value, Mapping) else value
        for each in inner:
            yield from _inside(each, depth - 1)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
