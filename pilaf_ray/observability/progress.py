"""Whether a role gets on with its work: counted in its process, and told with each heartbeat."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pilaf_ray.heartbeat import Heartbeat


class Progress:
    """Parts of work done so far, and since when there was none.

    One thread works and counts, another asks: neither ever sees half a change.

    Example: ``with PROGRESS.work("score"): model(batch); PROGRESS.advance()``
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._under_way: list[str] = []
        self._known: set[str] = set()
        self._excused = 0
        self._advances = 0

    def advance(self) -> None:
        """A part is done: a micro-batch, an optimiser step, a weight that is handed out, a step of an engine."""
        self._since = self._clock()
        self._advances += 1

    @contextmanager
    def work(self, name: str) -> Iterator[None]:
        """While the block runs there is work; its end is a part done, unless it fails."""
        if not self._under_way:
            self._since = self._clock()
        self._under_way.append(name)
        try:
            yield
            self._known.add(name)
            self.advance()
        finally:
            self._under_way.remove(name)

    @contextmanager
    def excused(self) -> Iterator[None]:
        """While the block runs standing still says nothing: it has a deadline of its own."""
        self._excused += 1
        try:
            yield
        finally:
            self._excused -= 1
            self._since = self._clock()

    def beat(self, memory_mib: float) -> Heartbeat:
        """What a heartbeat tells.

        The first work of each kind may stand still for long: kernels are loaded or compiled, and memory is taken.
        """
        works = tuple(self._under_way)
        silent = not works or self._excused or not self._known.issuperset(works)
        return Heartbeat(
            memory_mib=memory_mib,
            work=", ".join(sorted(set(works))),
            advances=self._advances,
            idle_seconds=None if silent else self._clock() - self._since,
        )


PROGRESS = Progress()
"""Of this process, which has one role."""
