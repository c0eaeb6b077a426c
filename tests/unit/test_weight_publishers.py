"""What a filesystem publisher leaves on disk, and what a ticket recognises."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pilaf_ray.engines.weight_files import FilesystemPublisher
from pilaf_ray.engines.weight_publishers import make_publisher
from pilaf_ray.engines.weight_tickets import SampleChecksum
from pilaf_ray.errors import ConfigError, WeightSyncError


def tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"b": torch.randn(3, 5, generator=draw), "a": torch.randn(7, generator=draw).to(torch.bfloat16)}


def test_a_version_is_complete_and_two_are_kept(tmp_path: Path) -> None:
    publisher = FilesystemPublisher(tmp_path / "w")
    tickets = [publisher.publish(version, tensors(version).items()) for version in (9, 10, 11)]
    folder = Path(tickets[-1].location)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["v00000010", "v00000011"]
    (shard,) = json.loads((folder / "shards.json").read_text())
    stored = load_file(folder / shard)
    assert stored.keys() == {"a", "b"}
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors(11).items())
    assert (tickets[-1].num_tensors, tickets[-1].num_bytes) == (2, 3 * 5 * 4 + 7 * 2)


def test_versions_that_go_back_are_the_newest(tmp_path: Path) -> None:
    publisher = FilesystemPublisher(tmp_path)
    tickets = [publisher.publish(version, tensors(version).items()) for version in (7, 8, 2, 3)]
    assert [Path(ticket.location).exists() for ticket in tickets] == [False, False, True, True]


def test_a_publisher_that_was_given_up_harms_no_version_of_its_successor(tmp_path: Path) -> None:
    given_up = FilesystemPublisher(tmp_path)
    before = [given_up.publish(version, tensors(version).items()) for version in (3, 4)]
    successor = FilesystemPublisher(tmp_path)
    first = successor.publish(1, tensors(1).items())
    assert Path(before[1].location).exists(), "somebody may be reading it"
    late = given_up.publish(5, tensors(5).items())
    second = successor.publish(2, tensors(2).items())
    given_up.publish(6, tensors(6).items())
    assert Path(first.location).exists() and Path(second.location).exists()
    assert not Path(late.location).exists()


def test_publishing_again_replaces_the_version(tmp_path: Path) -> None:
    publisher = FilesystemPublisher(tmp_path)
    first, second = (publisher.publish(4, tensors(seed).items()) for seed in (1, 2))
    assert first.location == second.location
    assert first.sample_checksum != second.sample_checksum


def test_checksum_sees_a_value_a_name_and_a_shape() -> None:
    def digest(name: str, tensor: torch.Tensor) -> str:
        checksum = SampleChecksum()
        checksum.add(name, tensor)
        return checksum.hexdigest()

    zeros = torch.zeros(4, 6)
    changed = zeros.clone()
    changed[2, 3] = 1.0
    variants = [digest("w", zeros), digest("w", changed), digest("v", zeros), digest("w", zeros.view(6, 4))]
    assert len(set(variants)) == 4
    assert digest("w", zeros) == digest("w", torch.zeros(4, 6))


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightSyncError, match="cannot publish weights version 1"):
        FilesystemPublisher(tmp_path / "file" / "w").publish(1, tensors(0).items())


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
def test_a_version_is_offered_by_folder_too(transport: str, tmp_path: Path) -> None:
    publisher = make_publisher(transport=transport, folder=tmp_path, timeout_seconds=5)
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
    assert make_publisher(transport=transport, timeout_seconds=5).publish_again(0) is None, "no folder"
    assert FilesystemPublisher(tmp_path).publish_again(3) is None, "it is the second way itself"


def test_unknown_transport_and_missing_folder() -> None:
    with pytest.raises(ConfigError, match="'pigeon' is unknown"):
        make_publisher(transport="pigeon")
    with pytest.raises(ConfigError, match="needs a folder"):
        make_publisher(transport="filesystem")
