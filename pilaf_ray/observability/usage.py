"""What processes spend."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pilaf_ray.types import RoleUsage


class UsageClock:
    """Busy seconds and peak memory of this process."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._busy = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the enclosed work."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._busy += time.monotonic() - started

    def usage(self) -> RoleUsage:
        """What was used so far; Linux reports the peak resident set in KiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return RoleUsage(role=self._role, busy_seconds=self._busy, peak_memory_mib=peak)


def resident_mib() -> float:
    """Resident memory now of this process and of all that it started, in MiB."""
    own = os.getpid()
    total = 0
    if Path(f"/proc/{own}/task/{own}/children").exists():
        started = list(_descendants(own))
    else:  # the kernel was built without it
        started = [process.pid for process in psutil.Process().children(recursive=True)]
    for pid in (own, *started):
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return float(total) / 2**20


def _descendants(pid: int) -> Iterator[int]:
    """Processes that ``pid`` started, and those that they did.

    psutil looks at every process of the machine for that, and a heartbeat does it every few seconds in every role.
    """
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = listed.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in map(int, children):
            yield child
            yield from _descendants(child)


def peak_mib(pid: int) -> float:
    """Peak resident memory of any process, in MiB; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return next((float(line.split()[1]) / 1024 for line in lines), 0.0)
