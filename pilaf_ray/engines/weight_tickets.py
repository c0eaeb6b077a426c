"""What a receiver of weights is told: the version, where it is, and a cheap fingerprint to know it by."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TRANSPORTS = ("filesystem", "shared_memory", "gloo", "nccl")
"""What a learner publishes by."""
MODEL_FOLDER = "model_folder"
"""What :mod:`pilaf_ray.engines.saved_policy` hands out: a Hugging Face folder that is there already."""
SAMPLES_PER_TENSOR = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightUpdate:
    """A ticket for one published version of the policy's weights.

    Example: ``WeightUpdate(version=3, transport="filesystem", location="/run/weights/v00000003",
    num_tensors=20, num_bytes=500_000, sample_checksum="9f…")``
    """

    version: int
    transport: str
    location: str
    """A folder (filesystem, model_folder), ``machine:path`` of a table (shared_memory), ``host:port`` (gloo, nccl)."""
    num_tensors: int
    num_bytes: int
    sample_checksum: str
    """SHA-256 over names, dtypes, shapes and up to 256 evenly spaced values of each tensor."""
    adapter_scale: float | None = None
    """The tensors are A and B of adapters, and the policy is reference + scale·B·A; None: they are the policy."""


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


def describe(name: str, tensor: "Tensor") -> dict[str, object]:
    """What a receiver must know to make room for a tensor."""
    return {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
