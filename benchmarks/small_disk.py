"""A small disk of its own for a run, which can be filled to the last byte: a file system in memory.

Needs the right to mount.
"""

import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILLER = "filler"
_CHUNK = 1 << 16


@contextmanager
def small_disk(folder: Path, *, mib: int) -> Iterator[None]:
    """``folder`` has room for ``mib`` MiB and no more while the block runs; what is in it is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path) -> None:
    """Write until the disk is full."""
    for size in (_CHUNK, 1):
        with (folder / FILLER).open("ab", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def make_room(folder: Path) -> None:
    """Take away what :func:`fill` wrote."""
    (folder / FILLER).unlink(missing_ok=True)
