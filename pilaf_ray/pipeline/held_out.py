"""Held-out evaluations of a run: sampled while their version is served, scored while the pipeline goes on."""

import asyncio
from collections.abc import Awaitable, Callable

Score = Callable[[], Awaitable[None]]
"""Measures what was sampled, and keeps it."""
Sample = Callable[[], Awaitable[Score]]
"""Samples from the version that is served."""
Due = Callable[[int], Sample | None]
"""How to evaluate a version; None where it is not to be."""


class HeldOutQueue:
    """One evaluation at a time: the next one's sampling waits until the one before is scored."""

    def __init__(self, due: Due) -> None:
        self._due = due
        self._scores: asyncio.Queue[Score] = asyncio.Queue()
        self._scored = asyncio.Event()
        self._scored.set()
        self._given_up = False

    async def sample(self, version: int) -> None:
        """Returns when another version may be served. Raises what sampling raises."""
        sample = self._due(version)
        if sample is None:
            return
        await self._scored.wait()
        if not self._given_up:
            score = await sample()
            self._scored.clear()
            self._scores.put_nowait(score)

    async def run(self) -> None:
        """Score what was sampled, until cancelled. Raises what scoring raises."""
        while True:
            score = await self._scores.get()
            await score()
            self._scored.set()

    async def finished(self) -> None:
        """Returns when all is scored, or given up."""
        await self._scored.wait()

    def give_up(self) -> None:
        """Nothing is sampled any more, and nobody waits for what is not scored yet."""
        self._given_up = True
        self._scored.set()
