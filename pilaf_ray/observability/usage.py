"""What processes spend."""

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
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return float(total) / 2**20


def peak_mib(pid: int) -> float:
    """Peak resident memory of any process, in MiB; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return next((float(line.split()[1]) / 1024 for line in lines), 0.0)
