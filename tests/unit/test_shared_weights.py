"""Weights in memory that a learner shares: what readers see, from when on and until when."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pilaf_ray.engines.shared_weights import SharedMemoryPublisher, read_shared
from pilaf_ray.engines.weight_publishers import make_publisher
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
    path = json.loads(Path(ticket.location.partition(":")[2]).read_bytes())["path"]
    with pytest.raises(PermissionError), Path(path).open("r+b", buffering=0) as file:
        file.write(b"spoilt")
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


def test_who_reads_a_version_keeps_it_when_the_next_one_comes() -> None:
    publisher = SharedMemoryPublisher()
    first = publisher.publish(1, tensors(1).items())
    reading = read_shared(first.location)
    second = publisher.publish(2, tensors(2).items())
    assert_same(reading, tensors(1))
    assert_same(read_shared(second.location), tensors(2))
    publisher.close()
    assert_same(reading, tensors(1))
    with pytest.raises(WeightSyncError, match="not there any more"):
        read_shared(second.location)


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


def test_engines_that_cannot_reach_the_memory_get_files(tmp_path: Path) -> None:
    publisher = make_publisher(transport="shared_memory", folder=tmp_path)
    first = publisher.publish(3, tensors(3).items())
    again = publisher.publish_again(3)
    assert again is not None
    assert (again.transport, again.sample_checksum) == ("filesystem", first.sample_checksum)
    (shard,) = json.loads((Path(again.location) / "shards.json").read_text())
    stored = load_file(Path(again.location) / shard)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors(3).items())
    publisher.publish(4, tensors(4).items())
    assert publisher.publish_again(3) is None, "superseded"
    publisher.close()
    assert publisher.publish_again(4) is None, "let go of"
    assert SharedMemoryPublisher().publish_again(0) is None, "no folder"
