"""Weights in memory that the learner shares with the engines of its machine: written once, mapped by everyone.

One anonymous file (``memfd``) of the learner's process holds the tensors, another the table of them. Engines open both
by way of ``/proc``. So there is no folder to clean up or to fill: the kernel frees a version when the learner has let
go of it and no engine maps it any more, however either of them ends.
"""

import fcntl
import json
import os
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilaf_ray.engines.weight_files import FilesystemPublisher
from pilaf_ray.engines.weight_tickets import SampleChecksum, WeightUpdate, describe
from pilaf_ray.errors import WeightSyncError

if TYPE_CHECKING:
    from torch import Tensor

TRANSPORT = "shared_memory"
ALIGNMENT = 64
"""Tensors begin at multiples of it, as every dtype and vector instruction wants."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SharedMemoryPublisher:
    """Keeps the newest version in memory that engines on the same machine read in place.

    Args:
        fallback_folder: where engines that cannot reach the memory find the version, once they have said so.
    """

    def __init__(self, *, fallback_folder: Path | str | None = None) -> None:
        self._fallback = None if fallback_folder is None else FilesystemPublisher(fallback_folder)
        self._newest: tuple[WeightUpdate, _Memory] | None = None

    def publish(
        self, version: int, named_tensors: Iterable[tuple[str, "Tensor"]], *, adapter_scale: float | None = None
    ) -> WeightUpdate:
        """Copy the tensors into memory of their own, and let go of the version before.

        Raises:
            WeightSyncError: the system gives no memory for them.
        """
        checksum, memory = SampleChecksum(), _Memory()
        try:
            for name, tensor in named_tensors:
                on_host = tensor.detach().to("cpu").contiguous()
                checksum.add(name, on_host)
                memory.add(name, on_host)
            location = memory.seal()
        except OSError as error:
            memory.close()
            raise WeightSyncError(f"cannot keep weights version {version} in shared memory: {error}") from error
        self.close()
        ticket = checksum.ticket(version=version, transport=TRANSPORT, location=location, adapter_scale=adapter_scale)
        self._newest = (ticket, memory)
        return ticket

    def publish_again(self, version: int) -> WeightUpdate | None:
        """Write the version into the fallback folder; None without one, or if it is superseded."""
        if self._fallback is None or self._newest is None:
            return None
        ticket, _ = self._newest
        if ticket.version != version:
            return None
        return self._fallback.publish(version, read_shared(ticket.location), adapter_scale=ticket.adapter_scale)

    def close(self) -> None:
        """Let go of the newest version; engines that map it keep what they have."""
        if self._newest is not None:
            _, memory = self._newest
            memory.close()
            self._newest = None


class _Memory:
    """One version, while it is written and as long as it is offered."""

    def __init__(self) -> None:
        self._tensors = open(os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb")  # noqa: SIM115
        self._table = open(os.memfd_create("weights-table", os.MFD_CLOEXEC), "wb")  # noqa: SIM115
        self._entries: list[dict[str, Any]] = []

    def add(self, name: str, tensor: "Tensor") -> None:
        """Append a contiguous CPU tensor."""
        import torch

        self._tensors.write(bytes(-self._tensors.tell() % ALIGNMENT))
        self._entries.append({**describe(name, tensor), "offset": self._tensors.tell()})
        self._tensors.write(tensor.reshape(-1).view(torch.uint8).numpy())

    def seal(self) -> str:
        """Nothing is written any more; returns where readers find it."""
        self._tensors.flush()
        fcntl.fcntl(self._tensors.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        self._table.write(json.dumps({"path": _path(self._tensors.fileno()), "tensors": self._entries}).encode())
        self._table.flush()
        return f"{_machine()}:{_path(self._table.fileno())}"

    def close(self) -> None:
        """Free it when nobody maps it any more."""
        self._tensors.close()
        self._table.close()


def read_shared(location: str) -> list[tuple[str, "Tensor"]]:
    """The tensors of a ticket's ``location`` in the order of publication; views of the shared memory, not copies.

    Raises:
        WeightSyncError: they are on another machine, or not there any more.
    """
    import torch

    machine, _, table = location.partition(":")
    if machine != _machine():
        raise WeightSyncError(
            "the learner shares its memory on another machine: set weights.transport: gloo, or give generators and "
            "learner the same node"
        )
    try:
        found = json.loads(Path(table).read_bytes())
        size = os.stat(found["path"]).st_size
        memory = torch.from_file(found["path"], shared=False, size=size, dtype=torch.uint8)
        # Every page is mapped now, beside the sampling, and not one by one while sampling waits for the load.
        memory[:: resource.getpagesize()].max()
    # A number that another file has got since is no table of weights.
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise WeightSyncError(
            f"the learner's shared memory is not there any more, or this process may not see it: {error}"
        ) from error
    return [(entry["name"], _view(memory, entry)) for entry in found["tensors"]]


def _view(memory: "Tensor", entry: dict[str, Any]) -> "Tensor":
    import torch

    dtype: torch.dtype = getattr(torch, entry["dtype"])
    shape: list[int] = entry["shape"]
    count = 1
    for length in shape:
        count *= length
    begin = entry["offset"]
    return memory[begin : begin + count * dtype.itemsize].view(dtype).view(shape)


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _machine() -> str:
    """The same for all processes, also in containers, until the machine starts again."""
    return _BOOT_ID.read_text().strip()
