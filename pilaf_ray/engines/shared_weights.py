"""Weights in memory that the learner shares with the engines of its machine: written once, mapped by everyone.

An anonymous file (``memfd``) of the learner's process holds the tensors of a version, another the table of them.
Engines open both by way of ``/proc``. So there is no folder to clean up or to fill: the kernel frees them when the
learner has ended and no engine maps them any more, however either of them ends.

Fresh memory takes the kernel longer than copying the weights into it, so a version is written over the one before the
last, if nobody maps that any more: whoever does holds a lock on it for as long.
"""

import fcntl
import json
import mmap
import os
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
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SharedMemoryPublisher:
    """Keeps the newest version in memory that engines on the same machine read in place.

    Args:
        fallback_folder: where engines that cannot reach the memory find the version, once they have said so.
    """

    def __init__(self, *, fallback_folder: Path | str | None = None) -> None:
        self._fallback = None if fallback_folder is None else FilesystemPublisher(fallback_folder)
        self._newest: tuple[WeightUpdate, _Memory] | None = None
        self._before: _Memory | None = None
        """What the newest version has superseded."""

    def publish(
        self, version: int, named_tensors: Iterable[tuple[str, "Tensor"]], *, adapter_scale: float | None = None
    ) -> WeightUpdate:
        """Copy the tensors into memory of their own; tickets of the version before become worthless with the next.

        Raises:
            WeightSyncError: the system gives no memory for them.
        """
        checksum, memory = SampleChecksum(), self._room()
        try:
            for name, tensor in named_tensors:
                on_host = tensor.detach().to("cpu").contiguous()
                checksum.add(name, on_host)
                memory.add(name, on_host)
            location = memory.offer()
        except OSError as error:
            memory.close()
            raise WeightSyncError(f"cannot keep weights version {version} in shared memory: {error}") from error
        ticket = checksum.ticket(version=version, transport=TRANSPORT, location=location, adapter_scale=adapter_scale)
        if self._newest is not None:
            _, self._before = self._newest
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
        """Let go of all versions; engines that map one keep what they have."""
        if self._newest is not None:
            _, memory = self._newest
            memory.close()
        if self._before is not None:
            self._before.close()
        self._newest = self._before = None

    def _room(self) -> "_Memory":
        """Memory that nobody reads; what was there before is overwritten."""
        before, self._before = self._before, None
        if before is not None:
            if before.take():
                return before
            before.close()
        fresh = _Memory()
        fresh.take()
        return fresh


class _Memory:
    """Room for one version."""

    def __init__(self) -> None:
        self._tensors = open(os.memfd_create("weights", os.MFD_CLOEXEC), "wb")  # noqa: SIM115
        self._table = open(os.memfd_create("weights-table", os.MFD_CLOEXEC), "wb")  # noqa: SIM115
        self._entries: list[dict[str, Any]] = []

    def take(self) -> bool:
        """Begin anew; False where somebody still reads what is there."""
        try:
            fcntl.flock(self._tensors, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._tensors.seek(0)
        self._entries = []
        return True

    def add(self, name: str, tensor: "Tensor") -> None:
        """Append a contiguous CPU tensor."""
        import torch

        self._tensors.write(bytes(-self._tensors.tell() % ALIGNMENT))
        self._entries.append({**describe(name, tensor), "offset": self._tensors.tell()})
        self._tensors.write(tensor.reshape(-1).view(torch.uint8).numpy())

    def offer(self) -> str:
        """Let readers in; returns where they find it."""
        self._tensors.truncate()
        self._tensors.flush()
        self._table.seek(0)
        self._table.write(json.dumps({"path": _path(self._tensors.fileno()), "tensors": self._entries}).encode())
        self._table.truncate()
        self._table.flush()
        fcntl.flock(self._tensors, fcntl.LOCK_UN)
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
        memory = torch.frombuffer(_mapped(found["path"]), dtype=torch.uint8)
    # A number that another file has got since is no table of weights.
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise WeightSyncError(
            f"the learner's shared memory is not there any more, or this process may not see it: {error}"
        ) from error
    # Every page is mapped now, beside the sampling, and not one by one while sampling waits for the load.
    memory[:: mmap.PAGESIZE].max()
    return [(entry["name"], _view(memory, entry)) for entry in found["tensors"]]


def _mapped(path: str) -> mmap.mmap:
    """A private view of the file; the lock lasts as long as the map, which keeps its own descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)


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
