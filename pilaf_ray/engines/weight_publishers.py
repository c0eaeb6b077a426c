"""The learner's side of a weight transfer: push a version, hand out a ticket for it.

A publisher takes the policy's tensors one by one, under their Hugging Face names,
and returns a :class:`WeightUpdate`: a small picklable ticket that says where the
weights are and how to recognise them. Generators redeem it with
``Generator.update_weights``; any number of them, at any time until the version is
superseded, so a generator that restarts catches up by itself.
"""

import json
import logging
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pilaf_ray.engines.rendezvous import own_address
from pilaf_ray.engines.shared_weights import SharedMemoryPublisher
from pilaf_ray.engines.weight_files import FilesystemPublisher
from pilaf_ray.engines.weight_tickets import TRANSPORTS, SampleChecksum, WeightUpdate, describe
from pilaf_ray.errors import ConfigError, WeightSyncError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

GATHER_SECONDS = 1.0
"""How long a row of receivers waits for those that have not come; they get a row of their own."""


class WeightPublisher(Protocol):
    """What the learner needs of a transport."""

    def publish(
        self, version: int, named_tensors: Iterable[tuple[str, "Tensor"]], *, adapter_scale: float | None = None
    ) -> WeightUpdate:
        """Make ``version`` available, whole weights or adapters; returns once the tensors may change again."""
        ...

    def publish_again(self, version: int) -> WeightUpdate | None:
        """A ticket for the same version by way of a shared folder, or None where there is none to offer."""
        ...

    def close(self) -> None:
        """Free connections and memory; tickets handed out become worthless."""
        ...


def make_publisher(
    *,
    transport: str,
    folder: Path | str | None = None,
    timeout_seconds: float = 120.0,
    host: str | None = None,
    relay: int = 1,
) -> WeightPublisher:
    """The publisher of ``transport``, one of ``TRANSPORTS``; ``"filesystem"`` needs ``folder``.

    Args:
        host: where generators reach this process; what its node's name resolves to when left out.
        relay: receivers that pass weights on to each other, over gloo or NCCL; 1: none does.

    Raises:
        ConfigError: the transport is unknown, or its folder is missing.
    """
    if transport == "filesystem":
        if folder is None:
            raise ConfigError("weight transport 'filesystem' needs a folder that every generator can read")
        return FilesystemPublisher(folder)
    if transport == "shared_memory":
        return SharedMemoryPublisher(fallback_folder=folder)
    if transport in ("gloo", "nccl"):
        return PeerPublisher(transport, host=host, timeout_seconds=timeout_seconds, fallback_folder=folder, relay=relay)
    raise ConfigError(f"weight transport {transport!r} is unknown: use one of {', '.join(TRANSPORTS)}")


class PeerPublisher:
    """Keeps the newest version in memory and sends it to each generator that asks, over ``gloo`` or ``nccl``.

    Every receiver forms a row of its own with this process (:mod:`pilaf_ray.engines.weight_peers`), so a dead one
    delays nobody. With ``relay`` those that come together stand in one row, and one that dies fails it for all.

    Args:
        relay: so many receivers are waited for, ``GATHER_SECONDS`` at most after the first; 1: each on its own.
    """

    def __init__(
        self,
        transport: str,
        *,
        host: str | None = None,
        timeout_seconds: float = 120.0,
        fallback_folder: Path | str | None = None,
        relay: int = 1,
    ) -> None:
        self._relay = relay
        self._transport = transport
        self._host = host or own_address()
        self._timeout = timedelta(seconds=timeout_seconds)
        self._stop: threading.Event | None = None
        self._fallback = None if fallback_folder is None else FilesystemPublisher(fallback_folder)
        self._newest: tuple[WeightUpdate, dict[str, Tensor]] | None = None

    def publish(
        self, version: int, named_tensors: Iterable[tuple[str, "Tensor"]], *, adapter_scale: float | None = None
    ) -> WeightUpdate:
        """Copy the tensors and serve them in the background until the next version or close.

        Raises:
            WeightSyncError: no port can be opened.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        checksum = SampleChecksum()
        tensors: dict[str, Tensor] = {}
        for name, tensor in named_tensors:
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            checksum.add(name, tensors[name])
        self.close()
        try:
            store = TCPStore("0.0.0.0", 0, None, is_master=True, timeout=self._timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise WeightSyncError(f"cannot serve weights version {version} on {self._host}: {error}") from error
        store.set("manifest", json.dumps([describe(n, t) for n, t in tensors.items()]))
        store.set("joined", "0")
        location = f"{self._host}:{store.port}"
        ticket = checksum.ticket(
            version=version, transport=self._transport, location=location, adapter_scale=adapter_scale
        )
        self._newest = (ticket, tensors)
        self._stop = threading.Event()
        threading.Thread(
            target=self._serve, args=(store, tensors, self._stop), name=f"weights-v{version}", daemon=True
        ).start()
        return ticket

    def publish_again(self, version: int) -> WeightUpdate | None:
        """Write the copy that is served into the fallback folder; None without one, or if it is superseded."""
        if self._fallback is None or self._newest is None:
            return None
        ticket, tensors = self._newest
        if ticket.version != version:
            return None
        return self._fallback.publish(version, tensors.items(), adapter_scale=ticket.adapter_scale)

    def close(self) -> None:
        """Stop serving; transfers under way are finished first."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _serve(self, store: "TCPStore", tensors: dict[str, "Tensor"], stop: threading.Event) -> None:
        """Put receivers that have come into rows; each row gets its own sending thread."""
        served = rows = 0
        first: float | None = None
        senders: list[threading.Thread] = []
        while not stop.wait(0.01):
            joined = store.add("joined", 0)
            if joined == served:
                continue
            first = first or time.monotonic()
            if joined - served < self._relay and time.monotonic() - first < GATHER_SECONDS:
                continue
            waiting, first = list(range(served + 1, joined + 1)), None
            for row in [waiting] if self._relay > 1 else [[receiver] for receiver in waiting]:
                sender = threading.Thread(target=self._send, args=(store, rows, row, tensors), daemon=True)
                sender.start()
                senders.append(sender)
                rows += 1
            served = joined
        for sender in senders:
            sender.join()

    def _send(self, store: "TCPStore", row: int, receivers: list[int], tensors: dict[str, "Tensor"]) -> None:
        from pilaf_ray.engines.weight_peers import buckets, connect, line_up, packed

        try:
            place = line_up(store, receivers, row=row)
            peer = connect(self._transport, store, place=place, timeout=self._timeout)
            for bucket in buckets([(n, t.numel() * t.element_size()) for n, t in tensors.items()]):
                peer.send(packed([tensors[name] for name in bucket]))
        except RuntimeError as error:
            # The receivers report their own failure; here it must only not stop the others.
            logger.warning("weights were not sent to receivers %s: %s", receivers, error)
