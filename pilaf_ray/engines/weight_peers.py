"""Messages between one sender and one receiver of weights, over gloo on CPUs and NCCL on GPUs.

Each pair is a group of its own: receivers do not wait for each other, and the learner's process
group is not touched.
"""

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

BUCKET_BYTES = 64 * 2**20
CONNECT_SECONDS = 10.0
"""A publisher listens before it hands a ticket out: one that cannot be reached for so long is gone."""
SENDER, RECEIVER = 0, 1


class Peer(Protocol):
    """The other side of a pair; messages are flat uint8 tensors in main memory."""

    def send(self, message: Tensor) -> None:
        """Return when ``message`` may change again. Raises RuntimeError."""
        ...

    def receive(self, message: Tensor) -> None:
        """Fill ``message``, which has the length of what is sent. Raises RuntimeError."""
        ...


class GlooPeer:
    """Over TCP, on any machine."""

    def __init__(self, store: Store, *, rank: int, timeout: timedelta) -> None:
        self._group = ProcessGroupGloo(store, rank, 2, timeout)

    def send(self, message: Tensor) -> None:
        self._group.send([message], RECEIVER, 0).wait()

    def receive(self, message: Tensor) -> None:
        self._group.recv([message], SENDER, 0).wait()


class NcclPeer:
    """Between two GPUs by vLLM's own NCCL communicator, one message at a time on the device.

    Both sides must be on GPUs of their own: NCCL refuses two ranks on one device.
    """

    def __init__(self, store: Store, *, rank: int, timeout: timedelta) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        store.set_timeout(timeout)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._link = PyNcclCommunicator(StatelessProcessGroup(rank=rank, world_size=2, store=store), self._device)

    def send(self, message: Tensor) -> None:
        self._link.send(message.to(self._device), RECEIVER)
        torch.cuda.synchronize(self._device)

    def receive(self, message: Tensor) -> None:
        arrived = torch.empty_like(message, device=self._device)
        self._link.recv(arrived, SENDER)
        message.copy_(arrived)


PEERS: dict[str, type[GlooPeer] | type[NcclPeer]] = {"gloo": GlooPeer, "nccl": NcclPeer}
"""By ``weights.transport``."""


def join_store(location: str, *, timeout: timedelta) -> "TCPStore":
    """The store of the publisher at ``host:port``; ``timeout`` is that of each later wait. Raises RuntimeError."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, _, port = location.rpartition(":")
    # PyTorch tries again for as long as this, also where the connection is refused at once.
    soon = min(timeout, timedelta(seconds=CONNECT_SECONDS))
    store = TCPStore(host, int(port), None, is_master=False, timeout=soon)
    store.set_timeout(timeout)
    return store


def connect(transport: str, store: "TCPStore", *, receiver: int, rank: int, timeout: timedelta) -> Peer:
    """The ``receiver``-th pair of a version's store: ``rank`` is ``SENDER`` or ``RECEIVER``."""
    return PEERS[transport](PrefixStore(f"pair/{receiver}", store), rank=rank, timeout=timeout)


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
