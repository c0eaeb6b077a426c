"""Weights in memory that a learner shares: what readers see, from when on and until when."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pilaf_ray.engines.shared_weights import SharedMemoryPublisher, read_shared
from pilaf_ray.errors import WeightSyncError

READER = """
import hashlib, sys
import torch
from pilaf_ray.engines.shared_weights import read_shared
for name, tensor in read_shared(sys.argv[1]):
    print(name, hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Odd sizes, one tensor that is not contiguous, one scalar, one that is empty."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "z": torch.randn(3, 5, generator=draw),
        "a": torch.randn(7, generator=draw).to(torch.bfloat16),
        "turned": torch.randn(4, 6, generator=draw).T,
        "scalar": torch.randn((), generator=draw, dtype=torch.float64),
        "none": torch.empty(0, 3),
    }


def assert_same(read: list[tuple[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name, _ in read] == list(expected)
    for name, tensor in read:
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_what_is_read_is_what_was_published() -> None:
    publisher = SharedMemoryPublisher()
    ticket = publisher.publish(5, tensors(5).items(), adapter_scale=0.5)
    assert_same(read_shared(ticket.location), tensors(5))
    assert (ticket.version, ticket.transport, ticket.adapter_scale) == (5, "shared_memory", 0.5)
    assert (ticket.num_tensors, ticket.num_bytes) == (5, 4 * 15 + 2 * 7 + 4 * 24 + 8)
    publisher.close()


def test_the_learner_may_change_its_weights_at_once() -> None:
    publisher = SharedMemoryPublisher()
    weights = tensors(1)
    ticket = publisher.publish(1, weights.items())
    weights["z"].zero_()
    assert_same(read_shared(ticket.location), tensors(1))
    publisher.close()


def test_a_reader_cannot_change_what_others_read() -> None:
    publisher = SharedMemoryPublisher()
    ticket = publisher.publish(1, tensors(1).items())
    dict(read_shared(ticket.location))["z"].zero_()
    assert_same(read_shared(ticket.location), tensors(1))
    publisher.close()


def test_another_process_reads_the_same_bytes() -> None:
    publisher = SharedMemoryPublisher()
    ticket = publisher.publish(2, tensors(2).items())
    read = subprocess.run([sys.executable, "-c", READER, ticket.location], check=True, capture_output=True, text=True)
    expected = {
        name: hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors(2).items()
    }
    assert dict(line.split() for line in read.stdout.splitlines()) == expected
    publisher.close()


def test_memory_is_used_again_once_nobody_reads_it() -> None:
    publisher = SharedMemoryPublisher()
    tickets = [publisher.publish(version, tensors(version).items()) for version in (1, 2, 3, 4)]
    assert [t.location for t in tickets[2:]] == [t.location for t in tickets[:2]]
    assert len({ticket.location for ticket in tickets}) == 2
    assert_same(read_shared(tickets[3].location), tensors(4))
    assert tickets[1].sample_checksum != tickets[3].sample_checksum, "an old ticket does not pass for a new one"
    publisher.close()
    with pytest.raises(WeightSyncError, match="not there any more"):
        read_shared(tickets[3].location)


def test_a_smaller_version_leaves_nothing_of_the_larger_one() -> None:
    publisher = SharedMemoryPublisher()
    for version in (1, 2):
        publisher.publish(version, tensors(version).items())
    small = {"a": torch.arange(3.0)}
    assert_same(read_shared(publisher.publish(3, small.items()).location), small)
    publisher.close()


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "one tensor"])
def test_who_reads_a_version_keeps_it_whatever_comes(whole: bool) -> None:
    publisher = SharedMemoryPublisher()
    first = publisher.publish(1, tensors(1).items())
    reading = read_shared(first.location)
    kept = reading if whole else reading[1:2]
    del reading
    for version in (2, 3, 4):
        newest = publisher.publish(version, tensors(version).items())
        assert_same(read_shared(newest.location), tensors(version))
    publisher.close()
    assert_same(kept, tensors(1) if whole else {"a": tensors(1)["a"]})


def test_what_is_being_written_is_not_read() -> None:
    publisher = SharedMemoryPublisher()
    old = [publisher.publish(version, tensors(version).items()) for version in (1, 2)]

    def while_written() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors(3).items():
            with pytest.raises(WeightSyncError, match="not there any more"):
                read_shared(old[0].location)
            assert_same(read_shared(old[1].location), tensors(2))
            yield name, tensor

    assert_same(read_shared(publisher.publish(3, while_written()).location), tensors(3))
    publisher.close()


def test_a_reader_that_is_killed_holds_no_lock() -> None:
    publisher = SharedMemoryPublisher()
    first = publisher.publish(1, tensors(1).items())
    waiting = f"{READER}print('read', flush=True)\nkept = read_shared(sys.argv[1])\nsys.stdin.read()"
    words = [sys.executable, "-c", waiting, first.location]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        while "read" not in reader.stdout.readline():
            assert reader.poll() is None
        publisher.publish(2, tensors(2).items())
        reader.kill()
        reader.wait()
    assert publisher.publish(3, tensors(3).items()).location == first.location
    publisher.close()


def test_a_learner_that_is_gone_and_a_learner_elsewhere() -> None:
    publisher = SharedMemoryPublisher()
    location = publisher.publish(1, tensors(1).items()).location
    machine, _, path = location.partition(":")
    with pytest.raises(WeightSyncError, match="another machine"):
        read_shared(f"{machine[::-1]}:{path}")
    with pytest.raises(WeightSyncError, match="not there any more"):
        read_shared(f"{machine}:/proc/999999999/fd/3")
    with pytest.raises(WeightSyncError, match="not there any more"):
        read_shared(f"{machine}:/proc/self/status")  # some other file has got the number
    publisher.close()


def test_a_version_that_was_let_go_is_offered_no_more(tmp_path: Path) -> None:
    publisher = SharedMemoryPublisher(fallback_folder=tmp_path)
    publisher.publish(4, tensors(4).items())
    publisher.close()
    assert publisher.publish_again(4) is None
