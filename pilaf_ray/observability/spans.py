"""Named stretches of time, added up."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Spans:
    """Seconds spent under each name; spans of different names may overlap or nest.

    Example: ``with spans.measure("evaluation"): await evaluate()``
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the enclosed work, also if it fails."""
        started = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - started

    @property
    def seconds(self) -> dict[str, float]:
        """Totals so far, in the order in which names first ended."""
        return dict(self._seconds)
