"""Atomic checkpoints: publish, fall back, keep, fail without loss."""

import errno
from pathlib import Path

import pytest

from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.errors import CheckpointError


async def write(folder: Path) -> None:
    (folder / "learner").mkdir()
    (folder / "learner" / "weights").write_text(folder.name)


async def full_disk(folder: Path) -> None:
    (folder / "weights").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_newest_is_found_and_older_ones_are_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.latest() is None
    for step in (1, 2, 3):
        await store.write(step, write)
    assert store.latest() == (3, tmp_path / "step-000003")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000002", "step-000003"]
    assert (tmp_path / "latest").read_text() == "step-000003"


async def test_the_start_of_a_round_is_kept_and_missed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    for step, keep in ((2, 2), (3, 2), (4, 2)):
        await store.write(step, write, keep=keep)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000004"]
    assert store.at(2) == tmp_path / "step-000002"
    await store.write(6, write, keep=6)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000006"]
    assert (store.has(6), store.has(4)) == (True, False)
    with pytest.raises(CheckpointError, match="the round under way is sampled from it"):
        store.at(4)


@pytest.mark.parametrize("damage", ["weights", "missing", "manifest", "no manifest"])
async def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2):
        await store.write(step, write)
    newest = tmp_path / "step-000002"
    match damage:
        case "weights":
            (newest / "learner" / "weights").write_text("tmp.3")
        case "missing":
            (newest / "learner" / "weights").unlink()
        case "manifest":
            (newest / "manifest.json").write_text('{"step": 2, "sha')
        case _:
            (newest / "manifest.json").unlink()
    assert store.latest() == (1, tmp_path / "step-000001")


async def test_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    await store.write(1, write)
    with pytest.raises(CheckpointError, match=r"step 2 .* the disk is full; earlier checkpoints are intact") as caught:
        await store.write(2, full_disk)
    assert "\n" not in str(caught.value)
    assert store.latest() == (1, tmp_path / "step-000001")
    assert not list(tmp_path.glob("tmp.*"))


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "tmp.7").mkdir()
    CheckpointStore(tmp_path, keep_last=1)
    assert list(tmp_path.iterdir()) == []
