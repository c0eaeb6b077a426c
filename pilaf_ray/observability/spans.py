"""What each role did and when: utilisation, and where the time went."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pilaf_ray.observability.events import EventLog


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """``role`` did ``name`` from ``start`` to ``end``, in seconds of the recorder's clock."""

    role: str
    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return self.end - self.start


class SpanRecorder:
    """Collects spans; overlapping spans of a role count once in its utilisation.

    Example: ``with spans.span("learner", "train"): ...``
    """

    def __init__(self, *, events: EventLog | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._events = events
        self._clock = clock
        self._started = clock()
        self.spans: list[Span] = []

    def record(self, role: str, name: str, start: float, end: float) -> None:
        """Add one finished span, and write it to the event log if there is one."""
        self.spans.append(Span(role=role, name=name, start=start, end=end))
        if self._events is not None:
            self._events.write("span", role=role, name=name, seconds=round(end - start, 4))

    @contextmanager
    def span(self, role: str, name: str) -> Iterator[None]:
        """Time the enclosed block, also when it raises."""
        start = self._clock()
        try:
            yield
        finally:
            self.record(role, name, start, self._clock())

    def totals(self) -> dict[str, float]:
        """Seconds by ``role/name``, longest first."""
        sums: dict[str, float] = {}
        for span in self.spans:
            key = f"{span.role}/{span.name}"
            sums[key] = sums.get(key, 0.0) + span.seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def utilization(self) -> dict[str, float]:
        """Share of the time since the recorder was made during which each role had a span."""
        elapsed = self._clock() - self._started
        by_role: dict[str, list[Span]] = {}
        for span in self.spans:
            by_role.setdefault(span.role, []).append(span)
        return {role: _covered(spans) / elapsed if elapsed > 0 else 0.0 for role, spans in by_role.items()}


def _covered(spans: list[Span]) -> float:
    """Length of the union of the spans."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total
