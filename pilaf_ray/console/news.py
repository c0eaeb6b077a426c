"""When a run has something new to show."""

import asyncio
from contextlib import suppress

from pilaf_ray.console.records import RunRecords

POLL_SECONDS = 1.0


class News:
    """Wakes those who watch a run: the files are looked at once a second, however many watch, and not if nobody does.

    Args:
        poll_seconds: between two looks.
    """

    def __init__(self, records: RunRecords, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._records, self._poll_seconds = records, poll_seconds
        self._changed = asyncio.Event()
        self._watching = 0
        self._looker: asyncio.Task[None] | None = None

    async def after(self, stamp: tuple[float, ...], *, seconds: float) -> None:
        """Return once the records' stamp is another one than ``stamp``, at the latest after ``seconds``."""
        self._watching += 1
        if self._looker is None or self._looker.done():
            self._looker = asyncio.create_task(self._look(), name="news of the run")
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while self._records.stamp == stamp:
                        await self._changed.wait()
        finally:
            self._watching -= 1

    async def _look(self) -> None:
        seen = self._records.stamp
        while self._watching:
            self._records.refresh()
            if self._records.stamp != seen:
                seen = self._records.stamp
                self._changed.set()
                self._changed = asyncio.Event()
            await asyncio.sleep(self._poll_seconds)
