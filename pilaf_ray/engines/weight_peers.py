"""Messages from one sender of weights to its receivers, over gloo on CPUs and NCCL on GPUs.

Who gets the same messages stands in a *row* behind the sender, a group of its own: the learner's process group is not
touched. A row of one receiver waits for nobody else. In a longer one the sender sends everything once, however many
there are: over gloo each receiver hands on to the next what it has got, while more arrives; NCCL chooses its own ways.
"""

import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

BUCKET_BYTES = 64 * 2**20
CONNECT_SECONDS = 10.0
"""A publisher listens before it hands a ticket out: one that cannot be reached for so long is gone."""
SENDER = 0
"""The first place of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where somebody stands."""

    row: int
    rank: int
    """0 is the sender."""
    size: int
    """With the sender."""


class Peer(Protocol):
    """The others of a row; messages are flat uint8 tensors in main memory."""

    def send(self, message: Tensor) -> None:
        """Return when ``message`` may change again. Raises RuntimeError."""
        ...

    def receive(self, message: Tensor) -> None:
        """Fill ``message``, which has the length of what is sent, and may be looked at only. Raises RuntimeError."""
        ...

    def finish(self) -> None:
        """Return when those behind have everything that this place hands on. Raises RuntimeError."""
        ...


class GlooPeer:
    """Over TCP, on any machine."""

    def __init__(self, store: Store, *, place: Place, timeout: timedelta) -> None:
        self._place = place
        self._group = ProcessGroupGloo(store, place.rank, place.size, timeout)
        self._handing_on: tuple[Work, Tensor] | None = None

    def send(self, message: Tensor) -> None:
        self._group.send([message], self._place.rank + 1, 0).wait()

    def receive(self, message: Tensor) -> None:
        self._group.recv([message], self._place.rank - 1, 0).wait()
        self.finish()
        if self._place.rank + 1 < self._place.size:
            # The message stays as it is until the next place has it.
            self._handing_on = self._group.send([message], self._place.rank + 1, 0), message

    def finish(self) -> None:
        if self._handing_on is not None:
            work, _ = self._handing_on
            work.wait()
            self._handing_on = None


class NcclPeer:
    """Between GPUs by vLLM's own NCCL communicator, one message at a time on the device.

    All places must be on GPUs of their own: NCCL refuses two ranks on one device.
    """

    def __init__(self, store: Store, *, place: Place, timeout: timedelta) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        store.set_timeout(timeout)
        self._device = torch.device("cuda", torch.cuda.current_device())
        group = StatelessProcessGroup(rank=place.rank, world_size=place.size, store=store)
        self._link = PyNcclCommunicator(group, self._device)

    def send(self, message: Tensor) -> None:
        self._link.broadcast(message.to(self._device), src=SENDER)
        torch.cuda.synchronize(self._device)

    def receive(self, message: Tensor) -> None:
        arrived = torch.empty_like(message, device=self._device)
        self._link.broadcast(arrived, src=SENDER)
        message.copy_(arrived)

    def finish(self) -> None:
        """Nothing to do: a broadcast ends everywhere."""


PEERS: dict[str, type[GlooPeer] | type[NcclPeer]] = {"gloo": GlooPeer, "nccl": NcclPeer}
"""By ``weights.transport``."""


def join_store(location: str, *, timeout: timedelta) -> "TCPStore":
    """The store of the publisher at ``host:port``; ``timeout`` is that of each later wait. Raises RuntimeError."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, _, port = location.rpartition(":")
    soon = min(timeout, timedelta(seconds=CONNECT_SECONDS))
    # PyTorch would try again for as long as that where a superseded version's publisher refuses at once.
    try:
        socket.create_connection((host, int(port)), timeout=soon.total_seconds()).close()
    except OSError as error:
        raise RuntimeError(f"nobody serves it there any more: {error}") from error
    store = TCPStore(host, int(port), None, is_master=False, timeout=soon)
    store.set_timeout(timeout)
    return store


def line_up(store: Store, receivers: Sequence[int], *, row: int) -> Place:
    """Tell ``receivers``, by the numbers under which they joined, their places in a row; returns the sender's."""
    size = len(receivers) + 1
    for rank, receiver in enumerate(receivers, start=1):
        store.set(f"place/{receiver}", json.dumps(asdict(Place(row=row, rank=rank, size=size))))
    return Place(row=row, rank=SENDER, size=size)


def join_row(store: Store) -> Place:
    """Where the sender puts this receiver. Raises RuntimeError."""
    receiver = store.add("joined", 1)
    return Place(**json.loads(store.get(f"place/{receiver}")))


def connect(transport: str, store: Store, *, place: Place, timeout: timedelta) -> Peer:
    """Meet the others of a row. Raises RuntimeError."""
    return PEERS[transport](PrefixStore(f"row/{place.row}", store), place=place, timeout=timeout)


def fetch(transport: str, location: str, *, timeout: timedelta) -> list[tuple[str, Tensor]]:
    """What the publisher at ``host:port`` serves, in its order, handed on to others of the row. Raises RuntimeError."""
    store = join_store(location, timeout=timeout)
    manifest: list[dict[str, Any]] = json.loads(store.get("manifest"))
    peer = connect(transport, store, place=join_row(store), timeout=timeout)
    tensors = {entry["name"]: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"])) for entry in manifest}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    for bucket in buckets(sizes.items()):
        message = torch.empty(sum(sizes[name] for name in bucket), dtype=torch.uint8)
        peer.receive(message)
        parts = torch.split(message, [sizes[name] for name in bucket])
        for name, part in zip(bucket, parts, strict=True):
            # Copied out: whoever loads them keeps references until a layer is complete.
            tensors[name].view(-1).view(torch.uint8).copy_(part)
    peer.finish()
    return list(tensors.items())


def buckets(sizes: Iterable[tuple[str, int]]) -> Iterator[list[str]]:
    """Names in order, grouped to at most ``BUCKET_BYTES`` (or one tensor) a message."""
    bucket: list[str] = []
    total = 0
    for name, size in sizes:
        if bucket and total + size > BUCKET_BYTES:
            yield bucket
            bucket, total = [], 0
        bucket.append(name)
        total += size
    if bucket:
        yield bucket


def packed(tensors: list[Tensor]) -> Tensor:
    """All bytes of ``tensors`` in one flat uint8 tensor."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
