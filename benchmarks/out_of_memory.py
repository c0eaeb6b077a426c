"""A process that the kernel kills for want of memory: it is put into a control group that is too small for it.

Needs the right to make control groups, which root has outside containers; both versions of the interface are known.
"""

import os
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
NAME = "pilaf-chaos"
LIMIT_BYTES = 4 << 20
"""Less than any Python process needs, so that the next page it asks for is its last."""


def _group() -> tuple[Path, str] | None:
    """Where the group goes and the name of its limit; None where no memory controller is mounted."""
    if (ROOT / "memory").is_dir():
        return ROOT / "memory" / NAME, "memory.limit_in_bytes"
    controllers = ROOT / "cgroup.controllers"
    if controllers.is_file() and "memory" in controllers.read_text().split():
        return ROOT / NAME, "memory.max"
    return None


def available() -> bool:
    """Whether processes can be starved here."""
    found = _group()
    return found is not None and os.access(found[0].parent, os.W_OK)


def tidy() -> None:
    """Remove the group, unless another run still uses it."""
    found = _group()
    if found is not None and found[0].is_dir():
        with suppress(OSError):
            found[0].rmdir()


def starve(pid: int) -> None:
    """Let ``pid`` have no more memory: the kernel kills it as soon as it asks for some."""
    found = _group()
    assert found is not None, "available() says where this works"
    folder, limit = found
    folder.mkdir(exist_ok=True)
    (folder / limit).write_text(str(LIMIT_BYTES))
    (folder / "cgroup.procs").write_text(str(pid))
