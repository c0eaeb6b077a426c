"""How long a role had something to do."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class BusyMeter:
    """Seconds during which at least one call was under way.

    Overlapping calls count once, so ``busy_seconds / elapsed`` lies in [0, 1].

    Example: ``with meter.call(): await actor.generate(...)``
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight = 0
        self._since = 0.0
        self._busy = 0.0

    @property
    def in_flight(self) -> int:
        """Calls under way now."""
        return self._in_flight

    @property
    def busy_seconds(self) -> float:
        """Busy time so far, the running stretch included."""
        return self._busy + (self._clock() - self._since if self._in_flight else 0.0)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count the enclosed call."""
        if self._in_flight == 0:
            self._since = self._clock()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._busy += self._clock() - self._since


class BusyShares:
    """Busy shares between one call and the next: a timeline of utilisation.

    Example: ``BusyShares(lambda: {"generator": meter.busy_seconds}).since_last()``
    """

    def __init__(self, seconds: Callable[[], Mapping[str, float]], clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._at, self._before = clock(), dict(seconds())

    def since_last(self) -> dict[str, float]:
        """Share of the time since the last call, in [0, 1], in which each role had a call under way."""
        now, busy = self._clock(), dict(self._seconds())
        elapsed = now - self._at
        shares = {
            role: min(1.0, (busy[role] - self._before.get(role, 0.0)) / elapsed) if elapsed > 0 else 0.0
            for role in busy
        }
        self._at, self._before = now, busy
        return shares
