"""Requests to stop a run: heard while it trains, whatever it is doing then.

SIGTERM, Ctrl-C ──▶ requested ──▶ the controller of the attempt under way, or of the next one
                        └───────▶ work between two attempts, which is given up
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

REPEAT_SECONDS = 1.0
"""A terminal and what started the run may both pass one Ctrl-C on; what comes later is a second one."""


class StopRequestedError(Exception):
    """Work was given up because somebody asked to stop; never leaves :mod:`pilaf_ray.pipeline`."""


class StopRequests:
    """Whether somebody asked to stop, and whom that concerns now.

    Args:
        announce: called at the first request.
        repeat_seconds: after so long a second Ctrl-C does what it did before.
    """

    def __init__(self, announce: Callable[[], None] = lambda: None, *, repeat_seconds: float = REPEAT_SECONDS) -> None:
        self._announce = announce
        self._repeat_seconds = repeat_seconds
        self._asked = asyncio.Event()
        self._stop: Callable[[], None] | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return self._asked.is_set()

    def request(self) -> None:
        """Ask; further requests change nothing."""
        if self.requested:
            return
        self._asked.set()
        self._announce()
        if self._stop is not None:
            self._stop()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While the block runs, SIGTERM and the first Ctrl-C are requests; a second Ctrl-C interrupts at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # None for a handler that is no Python's, which Python cannot put back.
            self._before[number] = signal.getsignal(number) or signal.SIG_DFL
            loop.add_signal_handler(number, self._heard, loop)
        try:
            yield
        finally:
            for number in list(self._before):
                self._give_back(loop, number)

    def _heard(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self.requested:
            loop.call_later(self._repeat_seconds, self._give_back, loop, signal.SIGINT)
        self.request()

    def _give_back(self, loop: asyncio.AbstractEventLoop, number: signal.Signals) -> None:
        """Once: a block that has ended gave both back."""
        if number in self._before:
            loop.remove_signal_handler(number)
            signal.signal(number, self._before.pop(number))

    @contextmanager
    def passed_on(self, stop: Callable[[], None]) -> Iterator[None]:
        """While the block runs, a request calls ``stop``: at once where it came before."""
        self._stop = stop
        if self.requested:
            stop()
        try:
            yield
        finally:
            self._stop = None

    async def unless_requested(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of ``work()``; raises StopRequestedError where a request comes first, or came before."""
        if self.requested:
            raise StopRequestedError
        doing, asked = asyncio.ensure_future(work()), asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait([doing, asked], return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise StopRequestedError
            return doing.result()
        finally:
            for task in (doing, asked):
                task.cancel()
            await asyncio.gather(doing, asked, return_exceptions=True)
