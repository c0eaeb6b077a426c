"""Atomic checkpoints: publish, fall back, keep, fail without loss."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilaf_ray.engines.checkpoint import CheckpointStore, read_manifest
from pilaf_ray.engines.learner_layout import LearnerLayout, described, require_loadable
from pilaf_ray.errors import CheckpointError, RoleLostError


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
    assert store.at(6) == tmp_path / "step-000006"
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


async def test_a_checkpoint_behind_is_published_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_seal = threading.Event()
    seal = CheckpointStore._seal

    def slow_seal(store: CheckpointStore, step: int, folder: Path) -> None:
        assert may_seal.wait(30)
        seal(store, step, folder)

    monkeypatch.setattr(CheckpointStore, "_seal", slow_seal)
    store, published = CheckpointStore(tmp_path, keep_last=2), list[int]()

    async def note(step: int, _path: Path) -> None:
        published.append(step)

    await store.write_behind(1, write, published=note)
    assert (store.latest(), published) == (None, []), "the step goes on before it is published"
    second = asyncio.create_task(store.write_behind(2, write, published=note))
    await asyncio.sleep(0)
    assert not list(tmp_path.glob("tmp.2.*")), "the second waits for the first"
    may_seal.set()
    await second
    await store.finish()
    assert published == [1, 2]
    assert store.latest() == (2, tmp_path / "step-000002")


async def ignore(_step: int, _path: Path) -> None:
    pass


async def test_a_failure_behind_is_raised_by_the_next_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: CheckpointStore, step: int, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(tmp_path, keep_last=2)
    await store.write(1, write)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_seal", full)
        await store.write_behind(2, write, published=ignore)
        with pytest.raises(CheckpointError, match=r"step 2 .* the disk is full"):
            await store.write_behind(3, write, published=ignore)
    await store.finish()
    assert store.latest() == (1, tmp_path / "step-000001")
    assert not list(tmp_path.glob("tmp.*"))


async def test_a_learner_that_was_given_up_writes_into_no_later_checkpoint(tmp_path: Path) -> None:
    """Cut off in the middle of a save it lives on, and goes on with it when the network heals."""
    store, given_up = CheckpointStore(tmp_path, keep_last=2), list[Path]()

    async def lost(folder: Path) -> None:
        given_up.append(folder)
        raise RoleLostError("policy learner rank 0 did not answer")

    with pytest.raises(RoleLostError):
        await store.write(4, lost)

    async def rebuilt(folder: Path) -> None:
        await write(folder)
        given_up[0].mkdir(exist_ok=True)
        (given_up[0] / "learner").mkdir()
        (given_up[0] / "learner" / "weights").write_text("of the learner that was given up")

    found = await store.write(4, rebuilt)
    assert "given up" not in (found / "learner" / "weights").read_text()
    assert store.latest() == (4, found)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "tmp.7").mkdir()
    CheckpointStore(tmp_path, keep_last=1)
    assert list(tmp_path.iterdir()) == []


async def test_what_a_rolled_back_attempt_left_damaged_takes_no_good_ones_place(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (3, 6, 9):
        await store.write(step, write)
    (tmp_path / "step-000009" / "learner" / "weights").write_text("torn")
    assert store.latest() == (6, tmp_path / "step-000006"), "the run goes on from here"
    await store.write(7, write)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000006", "step-000007"]
    assert store.latest() == (7, tmp_path / "step-000007")


async def test_a_manifest_says_the_ranks_and_another_form_of_state_is_refused_in_one_line(tmp_path: Path) -> None:
    two = {"learner": LearnerLayout(ranks=2, zero_stage=2), "reward": LearnerLayout(ranks=1, zero_stage=1)}
    folder = await CheckpointStore(tmp_path, keep_last=1, facts=described(two)).write(3, write)
    manifest = read_manifest(folder)
    assert manifest["learners"]["learner"] == {"ranks": 2, "zero_stage": 2} and manifest["step"] == 3
    one = {"learner": LearnerLayout(ranks=1, zero_stage=1), "reward": LearnerLayout(ranks=4, zero_stage=2)}
    require_loadable(folder, manifest, one)
    require_loadable(folder, {"step": 3, "sha256": {}}, one)
    for part, section, stage in (("learner", "learner", 3), ("reward", "reward_model", 0)):
        other = {**one, part: LearnerLayout(ranks=1, zero_stage=stage)}
        with pytest.raises(CheckpointError, match=rf"cannot be loaded with {section}\.zero_stage: {stage}") as caught:
            require_loadable(folder, manifest, other)
        assert "\n" not in str(caught.value)


async def test_the_best_by_score_outlives_newer_ones(tmp_path: Path) -> None:
    scores: dict[int, float] = {}
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=1, scores=lambda: scores)
    for step, score in ((1, 0.2), (2, 0.8), (3, 0.5), (4, 0.1)):
        await store.write(step, write)
        scores[step] = score
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000004"]


_WRITER = """
import asyncio, os, sys
from pathlib import Path
from pilaf_ray.engines.checkpoint import CheckpointStore, read_manifest
from pilaf_ray.engines.learner_layout import LearnerLayout, described, require_loadable

async def write(folder):
    for part in range(8):
        (folder / f"part-{part}").write_bytes(os.urandom(2**18))

async def main():
    store = CheckpointStore(Path(sys.argv[1]), keep_last=2)
    for step in range(1, 10**6):
        await store.write(step, write)
        print(step, flush=True)

asyncio.run(main())
"""


def test_whatever_moment_a_writer_is_killed_at_the_last_published_checkpoint_loads(tmp_path: Path) -> None:
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        first = int(writer.stdout.readline())
        # Anywhere in the checkpoints that follow, another place each time.
        time.sleep(0.007 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        published = max([first, *(int(line) for line in writer.stdout if line.endswith("\n"))])
        writer.wait()
        found = CheckpointStore(folder, keep_last=2).latest()
        assert found is not None
        assert found[0] in (published, published + 1), "killed between publication and its announcement at most"
        assert not list(folder.glob("tmp.*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_really_full_disk_keeps_the_checkpoint_before(small_disk: Path) -> None:
    async def write_much(folder: Path) -> None:
        (folder / "weights").write_bytes(os.urandom(600 * 1024))

    store = CheckpointStore(small_disk, keep_last=2)
    await store.write(1, write_much)
    with pytest.raises(CheckpointError, match=r"step 2 .* the disk is full; earlier checkpoints are intact"):
        await store.write(2, write_much)
    assert store.latest() == (1, small_disk / "step-000001")
    (small_disk / "step-000001" / "weights").stat()
    assert (small_disk / "latest").read_text() == "step-000001"
