"""A cheap fingerprint of weights, by which a receiver knows that it has what was sent."""

import hashlib
from typing import TYPE_CHECKING

from pilaf_ray.types import WeightUpdate

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES_PER_TENSOR = 256


class SampleChecksum:
    """Running fingerprint of a stream of named tensors; order matters."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.num_tensors = 0
        self.num_bytes = 0

    def add(self, name: str, tensor: "Tensor") -> None:
        """Take one CPU tensor of any shape and dtype into account."""
        import torch

        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        samples = flat[::step].contiguous().view(torch.uint8).numpy()
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self._hash.update(samples.tobytes())
        self.num_tensors += 1
        self.num_bytes += tensor.numel() * tensor.element_size()

    def ticket(self, *, version: int, transport: str, location: str, adapter_scale: float | None) -> WeightUpdate:
        """The ticket of everything added so far."""
        return WeightUpdate(
            version=version,
            transport=transport,
            location=location,
            num_tensors=self.num_tensors,
            num_bytes=self.num_bytes,
            sample_checksum=self.hexdigest(),
            adapter_scale=adapter_scale,
        )

    def hexdigest(self) -> str:
        """The fingerprint so far."""
        return self._hash.hexdigest()
