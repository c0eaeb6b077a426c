"""Messages between a sender and a receiver: order, bytes, and how tensors are packed into them."""

import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from pilaf_ray.engines import weight_peers
from pilaf_ray.engines.weight_peers import Peer, buckets, connect, join_row, join_store, line_up, packed


def test_buckets_keep_the_order_and_the_limit() -> None:
    limit = weight_peers.BUCKET_BYTES
    sizes = [("a", limit // 2), ("b", limit // 2), ("c", 1), ("huge", 3 * limit), ("d", 5)]
    assert list(buckets(sizes)) == [["a", "b"], ["c"], ["huge"], ["d"]]


def test_packed_bytes_are_those_of_the_tensors_one_behind_the_other() -> None:
    tensors = [torch.tensor([1.5, -2.0]), torch.tensor([[3]], dtype=torch.int16), torch.tensor([0.25]).bfloat16()]
    flat = packed(tensors)
    assert flat.dtype is torch.uint8
    assert flat.tolist() == [byte for t in tensors for byte in t.reshape(-1).view(torch.uint8).tolist()]


def test_a_publisher_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_peers, "CONNECT_SECONDS", 600.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        location = f"127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"nobody serves it there any more: .*refused"):
        join_store(location, timeout=timedelta(seconds=600))
    assert time.monotonic() - began < 60


def test_waits_for_a_publisher_that_is_there_have_their_own_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_peers, "CONNECT_SECONDS", 5.0)
    timeout = timedelta(seconds=20)
    store = TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timeout, wait_for_workers=False)
    joined = join_store(f"127.0.0.1:{store.port}", timeout=timeout)
    assert joined.timeout == timeout


def test_two_receivers_of_one_store_get_their_own_messages_in_order() -> None:
    timeout = timedelta(seconds=20)
    store = TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timeout, wait_for_workers=False)
    messages = {
        receiver: [torch.full((n,), 10 * receiver + n, dtype=torch.uint8) for n in (1, 7)] for receiver in (1, 2)
    }

    # Both ends live until all has arrived: a group that is dropped closes its connections.
    peers: list[Peer] = []

    def send(receiver: int) -> None:
        peer = connect("gloo", store, place=line_up(store, [receiver], row=receiver), timeout=timeout)
        peers.append(peer)
        for message in messages[receiver]:
            peer.send(message)

    # One after the other: gloo connects pairs of one process reliably only if they do not meet at the same time.
    for receiver, expected in messages.items():
        sender = threading.Thread(target=send, args=(receiver,))
        sender.start()
        client = TCPStore("127.0.0.1", store.port, None, is_master=False, timeout=timeout)
        peer = connect("gloo", client, place=join_row(client), timeout=timeout)
        peers.append(peer)
        for message in expected:
            arrived = torch.empty_like(message)
            peer.receive(arrived)
            assert torch.equal(arrived, message)
        sender.join()
