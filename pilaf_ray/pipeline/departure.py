"""The end of a replica, and calls that end with it."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from pilaf_ray.errors import RoleLostError

T = TypeVar("T")


class Departure:
    """Happens at most once; any number of calls may wait beside it.

    A call comes and leaves at the same cost however many others there are. One shared future would do the same, but
    it searches all its callbacks when one is taken off, and a pool has as many calls as there are pairs in flight.
    """

    def __init__(self) -> None:
        self._error: RoleLostError | None = None
        self._signals: set[asyncio.Future[None]] = set()

    @property
    def error(self) -> RoleLostError | None:
        """Why the replica is gone; None while it is there."""
        return self._error

    def happen(self, error: RoleLostError) -> None:
        """End all calls that wait, and those to come; the first error stays."""
        if self._error is not None:
            return
        self._error = error
        for signal in self._signals:
            _wake(signal)

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """The result of ``work``; raises why the replica is gone if that comes first."""
        task = asyncio.ensure_future(work)
        signal = asyncio.get_running_loop().create_future()
        # As asyncio.wait does, but with nothing to look through: a pool makes two calls for each response.
        task.add_done_callback(lambda _: _wake(signal))
        self._signals.add(signal)
        if self._error is not None:
            _wake(signal)
        try:
            await signal
            if not task.done():
                assert self._error is not None
                raise self._error
            return task.result()
        finally:
            self._signals.discard(signal)
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _wake(signal: "asyncio.Future[None]") -> None:
    if not signal.done():
        signal.set_result(None)
