"""How long a role had something to do."""

import time
from collections.abc import Callable, Iterator
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
