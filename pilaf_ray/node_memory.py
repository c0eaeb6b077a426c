"""How much memory the node that this runs on has, whoever uses it now."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from pilaf_ray.placement import GIB

# Roles see the GPUs that Ray gives them; this sees all.
_GPU_SIZES = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeMemory:
    """Totals in GiB.

    Example: ``NodeMemory(host_gib=900.0, gpu_gib=80.0)``
    """

    host_gib: float
    gpu_gib: float
    """Of the smallest GPU; 0 where there is none, or none says."""


def read_memory() -> NodeMemory:
    """Of the node that this runs on: what the machine has, or as much of it as this process's control groups allow."""
    return NodeMemory(
        host_gib=min([psutil.virtual_memory().total, *group_limits(Path("/"))]) / GIB,
        gpu_gib=min(_gpu_bytes(), default=0) / GIB,
    )


def group_limits(root: Path) -> Iterator[int]:
    """Bytes that each control group of this process allows, where it sets a limit; ``root`` is the file system's."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        # A container may see its own group as the top, and its path is another machine's then.
        limits = (_text(top.joinpath(*parts[:depth]) / name).strip() for depth in range(len(parts) + 1))
        yield from (int(limit) for limit in limits if limit.isdigit())


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _gpu_bytes() -> list[int]:
    try:
        asked = subprocess.run(_GPU_SIZES, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * 2**20 for line in asked.stdout.split("\n") if line.strip().isdigit()]
