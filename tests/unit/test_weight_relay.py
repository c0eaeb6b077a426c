"""Receivers that pass weights on to each other, each in its own process: what arrives, and what the sender sends."""

import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.pool import AsyncResult, Pool

import pytest
import torch

from pilaf_ray.engines import weight_peers
from pilaf_ray.engines.weight_peers import PEERS, GlooPeer, buckets, connect, fetch, join_row, join_store
from pilaf_ray.engines.weight_publishers import PeerPublisher

RECEIVERS = 3
TIMEOUT = timedelta(seconds=60)
BUCKET = 300_000
"""Bytes; several messages, so that receiving and handing on overlap."""


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    many = {f"layer.{n}": torch.randn(200, 101 + n, generator=draw) for n in range(7)}
    return {**many, "small": torch.randn(3, generator=draw).bfloat16(), "empty": torch.empty(0)}


def digest(named: list[tuple[str, torch.Tensor]]) -> str:
    whole = hashlib.sha256()
    for name, tensor in named:
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def receive(location: str) -> str:
    weight_peers.BUCKET_BYTES = BUCKET
    return digest(fetch("gloo", location, timeout=TIMEOUT))


def die(location: str) -> None:
    """Stands in the row, and ends with its process after the first message."""
    weight_peers.BUCKET_BYTES = BUCKET
    store = join_store(location, timeout=TIMEOUT)
    peer = connect("gloo", store, place=join_row(store), timeout=TIMEOUT)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors().items()}
    peer.receive(torch.empty(sum(sizes[name] for name in next(buckets(sizes.items()))), dtype=torch.uint8))
    os._exit(1)


def warm_up() -> None:
    """Import what the receivers need."""


class CountingPeer(GlooPeer):
    """Of the sender."""

    sent = 0

    def send(self, message: torch.Tensor) -> None:
        CountingPeer.sent += message.numel()
        super().send(message)


@pytest.fixture(scope="module")
def pools() -> Iterator[list[Pool]]:
    spawn = multiprocessing.get_context("spawn")
    pools = [spawn.Pool(1) for _ in range(RECEIVERS)]
    for ready in [pool.apply_async(warm_up) for pool in pools]:
        ready.get(120)
    yield pools
    for pool in pools:
        pool.terminate()
        pool.join()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_peers, "BUCKET_BYTES", BUCKET)
    monkeypatch.setitem(PEERS, "gloo", CountingPeer)
    CountingPeer.sent = 0


@pytest.mark.parametrize(("relay", "times"), [(1, RECEIVERS), (RECEIVERS, 1)])
@pytest.mark.usefixtures("counted")
def test_every_receiver_has_every_byte_and_with_a_relay_the_sender_sends_once(
    pools: list[Pool], relay: int, times: int
) -> None:
    publisher = PeerPublisher("gloo", timeout_seconds=60, relay=relay)
    ticket = publisher.publish(1, tensors().items())
    asked = [pool.apply_async(receive, (ticket.location,)) for pool in pools]
    assert {answer.get(120) for answer in asked} == {digest(list(tensors().items()))}
    publisher.close()
    assert CountingPeer.sent == times * ticket.num_bytes


@pytest.mark.usefixtures("counted")
def test_who_comes_late_or_not_at_all_holds_nobody_up_for_long(pools: list[Pool]) -> None:
    publisher = PeerPublisher("gloo", timeout_seconds=60, relay=RECEIVERS)
    ticket = publisher.publish(1, tensors().items())
    expected = digest(list(tensors().items()))
    assert [pool.apply_async(receive, (ticket.location,)).get(120) for pool in pools[:2]] == [expected, expected]
    publisher.close()
    assert CountingPeer.sent == 2 * ticket.num_bytes, "each was alone in its row"


@pytest.mark.usefixtures("counted")
def test_who_dies_in_a_row_fails_it_for_those_behind_at_once(pools: list[Pool]) -> None:
    publisher = PeerPublisher("gloo", timeout_seconds=60, relay=RECEIVERS)
    ticket = publisher.publish(1, tensors().items())
    began = time.monotonic()
    pools[0].apply_async(die, (ticket.location,))
    store = join_store(ticket.location, timeout=TIMEOUT)
    while store.add("joined", 0) < 1:
        time.sleep(0.01)  # until another process is where it should be, not to order work
    others: list[AsyncResult[str]] = [pool.apply_async(receive, (ticket.location,)) for pool in pools[1:]]
    for other in others:
        with pytest.raises(RuntimeError):
            other.get(120)
    assert time.monotonic() - began < TIMEOUT.total_seconds() / 2, "nobody waited for the time-out"
    publisher.close()
