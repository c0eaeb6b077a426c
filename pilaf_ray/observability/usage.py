"""What a role's own process spends."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
