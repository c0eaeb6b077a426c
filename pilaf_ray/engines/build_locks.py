"""Locks that killed processes left among PyTorch's compiled extensions.

While a process builds or loads one of DeepSpeed's operators it holds a file ``lock`` in the operator's folder, open,
and removes it at the end. SIGKILL leaves the file behind, and whoever needs the operator next waits without an end
for somebody to remove it.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

QUIET_SECONDS = 60.0
"""A holder that cannot be seen from here, on another node of a shared folder or in another container, changes something
in the folder more often than that. If one is overlooked all the same, the operator is built twice."""
LOOK_SECONDS = 1.0


def extensions_folder() -> Path:
    """Where PyTorch builds extensions, each in a folder of its own."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen is not None:
        return Path(chosen)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def clear_dead_locks(
    root: Path, *, clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Remove the locks below ``root`` that nobody can hold; on return each lock that is left has a living holder.

    A lock is dead when no process of this machine has it open, and nothing in its folder has changed for
    ``QUIET_SECONDS``. One that is merely too young to tell is waited for. Several ranks may do this at once.
    """
    told = False
    while not all(_is_settled(root, lock, clock) for lock in _locks(root)):
        if not told:
            logger.info("waiting until it is certain that nobody holds the locks in %s", root)
            told = True
        sleep(LOOK_SECONDS)


def _locks(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("lock") if path.is_file())


def _is_settled(root: Path, lock: Path, clock: Callable[[], float]) -> bool:
    """Whether there is nothing to wait for: the lock is gone by now, or its holder lives and will remove it."""
    with _alone(root):
        try:
            quiet = clock() - max(path.stat().st_mtime for path in (lock.parent, *lock.parent.iterdir()))
            if not lock.exists() or _is_held(lock):
                return True
            if quiet < QUIET_SECONDS:
                return False
            lock.unlink()
        except FileNotFoundError:
            # Something in the folder went away meanwhile: it is being worked in.
            return False
        logger.warning("removed %s: the process that held it died, and nothing moved there for %.0f s", lock, quiet)
        return True


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One rank at a time judges and removes: the next would take the first one's new lock for the old one."""
    with (root / "pilaf_ray.guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as far as this user may know."""
    path = os.path.realpath(lock)
    for process in psutil.process_iter():
        try:
            if any(opened.path == path for opened in process.open_files()):
                return True
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return False
