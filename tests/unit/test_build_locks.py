"""Which locks among compiled extensions are taken for dead."""

import logging
import os
import threading
from pathlib import Path

import pytest

from pilaf_ray.engines.build_locks import QUIET_SECONDS, clear_dead_locks

NOW = 1_000_000.0


class Time:
    """A clock that only sleeping moves, ten times as fast as asked; it starts ``age`` after the files of the test."""

    def __init__(self, age: float = 3600.0) -> None:
        self.now = NOW + age
        self.sleeps = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        self.now += 10 * seconds


def operator(root: Path, name: str = "deepspeed_op") -> Path:
    """A folder that was being built in at ``NOW``; returns its lock."""
    folder = root / "py311_cpu" / name
    folder.mkdir(parents=True)
    for file in ("build.ninja", "op.o", "lock"):
        (folder / file).touch()
    for path in (*folder.iterdir(), folder):
        os.utime(path, (NOW, NOW))
    return folder / "lock"


def removals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_lock_without_a_holder_is_removed_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock, time = operator(tmp_path), Time()
    clear_dead_locks(tmp_path, clock=time.clock, sleep=time.sleep)
    assert sorted(path.name for path in lock.parent.iterdir()) == ["build.ninja", "op.o"]
    assert removals(caplog) == [f"removed {lock}: the process that held it died, and nothing moved there for 3600 s"]
    assert time.sleeps == 0


def test_a_lock_that_is_held_is_left_to_its_holder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, dead, time = operator(tmp_path, "held"), operator(tmp_path, "dead"), Time()
    descriptor = os.open(held, os.O_RDONLY)
    try:
        clear_dead_locks(tmp_path, clock=time.clock, sleep=time.sleep)
    finally:
        os.close(descriptor)
    assert held.exists() and not dead.exists()
    assert len(removals(caplog)) == 1 and time.sleeps == 0


def test_a_young_lock_is_waited_for_until_its_folder_was_quiet_for_long(tmp_path: Path) -> None:
    """Its holder may be on another node: an object file that appears there shows that it lives."""
    lock, time = operator(tmp_path), Time(age=10.0)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        assert lock.exists()
        if time.sleeps == 3:
            os.utime(lock.parent / "op.o", (time.now, time.now))

    clear_dead_locks(tmp_path, clock=time.clock, sleep=sleep)
    assert not lock.exists()
    assert time.now == NOW + 10.0 + 30.0 + QUIET_SECONDS


def test_a_lock_that_its_holder_releases_is_waited_for_no_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock, time = operator(tmp_path), Time(age=0.0)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if time.sleeps == 3:
            lock.unlink()

    clear_dead_locks(tmp_path, clock=time.clock, sleep=sleep)
    assert time.sleeps == 3 and removals(caplog) == []


def test_ranks_that_come_together_do_not_take_each_others_new_lock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock, together = operator(tmp_path), threading.Barrier(4)
    builders: list[int] = []

    def rank() -> None:
        time = Time()
        together.wait()
        clear_dead_locks(tmp_path, clock=time.clock, sleep=time.sleep)
        try:
            # As PyTorch does next: the first takes the lock and builds, the others wait for it.
            builders.append(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert len(builders) == 1 and lock.exists() and len(removals(caplog)) == 1
    os.close(builders[0])


def test_without_a_folder_there_is_nothing_to_do(tmp_path: Path) -> None:
    clear_dead_locks(tmp_path / "none")
    assert not (tmp_path / "none").exists()
