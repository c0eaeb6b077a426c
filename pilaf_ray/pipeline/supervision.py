"""When a role is slow or stuck, gets another chance, or is given up: pure, clocks are passed in."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from pilaf_ray.errors import GivenUpError, RoleLostError
from pilaf_ray.heartbeat import Heartbeat

LATE_SECONDS = 2.0
"""A timer that rings so much later than it was set for did so because its process did not run."""

Report = Callable[..., None]
"""``report(event, **details)`` writes a line of ``events.jsonl``."""


def no_report(event: str, **details: object) -> None:
    """Nobody keeps records, e.g. in an evaluation outside a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisionPolicy:
    """How patient a run is with its roles. Times in seconds.

    Example: ``SupervisionPolicy(failures_in_a_row=5).pause(2)`` is 1.0
    """

    failures_in_a_row: int = 5
    """After so many failures of one replica without a success between them, the run stops."""
    first_pause: float = 1.0
    """Before the second replacement in a row; it doubles from there. The first comes at once."""
    longest_pause: float = 60.0
    heartbeat_every: float = 5.0
    heartbeat_seconds: float = 60.0
    """A replica that answers no heartbeat for so long is stopped or stuck, however slow it may be."""
    stuck_seconds: float = 300.0
    """One that answers and gets no further with its work for so long is stuck."""

    def pause(self, failures: int) -> float:
        """Seconds to wait before the replacement that follows ``failures`` failures in a row."""
        if failures <= 1:
            return 0.0
        return float(min(self.longest_pause, self.first_pause * 2 ** (failures - 2)))


def is_late(passed: float, *, deadline: float) -> bool:
    """Whether a deadline was noticed so long after its time that nothing follows from it.

    Then whoever waited was stopped itself (a signal, a paused virtual machine), and answers may lie there unread.

    Example: ``is_late(61.0, deadline=6.0)`` is True
    """
    return passed > deadline + LATE_SECONDS


class ProgressWatch:
    """Tells a slow replica from a stuck one, by what its heartbeats say of its work.

    With heartbeats h seconds apart: one that does a part of its work at least every ``stuck_seconds`` is never
    reported, and one that does none any more is by the first heartbeat after ``stuck_seconds``, at most h later.

    Args:
        name: of the replica, e.g. ``generator 0``.
    """

    def __init__(
        self,
        name: str,
        *,
        policy: SupervisionPolicy,
        report: Report = no_report,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._policy, self._report, self._clock = name, policy, report, clock
        self._advances = 0
        self._moved, self._heard = -math.inf, clock()
        self._unseen = 0.0

    def heard(self, beat: Heartbeat) -> None:
        """Take a heartbeat into account; raises RoleLostError where the replica is stuck."""
        now, policy = self._clock(), self._policy
        gap, self._heard = now - self._heard, now
        if beat.advances != self._advances:
            self._advances, self._moved = beat.advances, now
            self._unseen = 0.0
        if is_late(gap, deadline=policy.heartbeat_every + policy.heartbeat_seconds):
            # Whoever asks was stopped, and then, on the same machine, so was who is asked: it may have lost nothing.
            self._unseen += gap - policy.heartbeat_every
        since = beat.idle_seconds or 0.0
        self._unseen = min(self._unseen, since)
        idle = since - self._unseen
        if idle > policy.stuck_seconds:
            self._report("stuck", role=self._name, work=beat.work, idle_seconds=idle, advances=beat.advances)
            raise RoleLostError(
                f"{self._name} is stuck: it answers, but got no further with {beat.work} for {idle:.3g} s "
                f"(supervision.stuck_seconds={policy.stuck_seconds:g}); see its log"
            )

    def left(self, since: float, *, seconds: float) -> float:
        """Seconds that a call of the moment ``since`` still has, if it may go on for ``seconds`` without progress."""
        return max(since, self._moved) + seconds - self._clock()


class CircuitBreaker:
    """Counts failures in a row and remembers the first: later ones are often its consequences.

    Example: ``breaker = CircuitBreaker("oracle 0", limit=3); breaker.failed("out of memory")``
    """

    def __init__(self, name: str, *, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._first = ""
        self.failures = 0

    @property
    def is_open(self) -> bool:
        """Whether the limit is reached."""
        return self.failures >= self._limit

    def failed(self, cause: object) -> None:
        """Count a failure."""
        if self.failures == 0:
            self._first = str(cause)
        self.failures += 1

    def succeeded(self) -> None:
        """Forget the failures so far."""
        self.failures = 0

    def error(self) -> GivenUpError:
        """What stops the run once the breaker is open."""
        return GivenUpError(
            f"{self._name} failed {self.failures} times in a row; first: {self._first} "
            "(mend this, then continue with --resume; supervision.failures_in_a_row sets the patience)"
        )
