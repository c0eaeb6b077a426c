"""Where ZeRO keeps what it parts, beyond its stage: on the host, on a disk, or once in every few ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pilaf_ray.errors import ConfigError

Place = Literal["cpu", "nvme"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadSettings:
    """What leaves the device between its uses.

    Example: ``OffloadSettings(optimizer="cpu")``
    """

    optimizer: Place | None = None
    """The optimiser's state, fp32 master weights and the step itself; under ZeRO 1 to 3, to a disk under ZeRO-3."""
    parameters: Place | None = None
    """Weights that are parted among ranks; under ZeRO-3."""
    nvme_path: str | None = None
    """Folder on a local disk, for what goes to ``nvme``."""


NO_OFFLOAD = OffloadSettings()


def zero_section(stage: int, *, offload: OffloadSettings, hybrid_ranks: int, pin_memory: bool) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization``.

    Args:
        hybrid_ranks: every so many neighbouring ranks keep all weights among themselves from the forward to the
            backward, so that the backward gathers from them only; 1: all ranks do.
        pin_memory: of the host, where a device copies from it.
    """
    section: dict[str, Any] = {"stage": stage}
    if hybrid_ranks > 1:
        section["zero_hpz_partition_size"] = hybrid_ranks
    for name, place in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
        if place is not None:
            disk = {"nvme_path": offload.nvme_path} if place == "nvme" else {}
            section[name] = {"device": place, "pin_memory": pin_memory, **disk}
    return section


def async_io_builds() -> bool:
    """Whether DeepSpeed can build what reads and writes a disk beside the training."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def check_disk(offload: OffloadSettings, *, async_io: Callable[[], bool] = async_io_builds) -> None:
    """Look, on a machine with a learner rank, whether it can offload to a disk; before a model is loaded.

    Raises:
        ConfigError: there is no such folder, or DeepSpeed cannot build what reads and writes it.
    """
    if "nvme" not in (offload.optimizer, offload.parameters):
        return
    if not Path(offload.nvme_path or "").is_dir():
        raise ConfigError(f"learner.offload.nvme_path: there is no folder '{offload.nvme_path}' on this node: make it")
    if not async_io():
        raise ConfigError(
            "learner.offload: nvme needs DeepSpeed's asynchronous I/O, which cannot be built on this node: install "
            "libaio-dev, or offload to cpu"
        )
