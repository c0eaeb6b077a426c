"""The order of a weight update, and nothing else: push, pull, probe.

The caller releases the gate's slots after :meth:`WeightSync.serve` returns.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from pilaf_ray.errors import WeightSyncError

Update = TypeVar("Update")
T = TypeVar("T")


class WeightSync(Generic[Update]):
    """Moves one version at a time from the learner to every generator.

    Args:
        push: publishes a version and returns what is needed to fetch and recognise it.
        pulls: one callable a generator; returns once that generator serves the version.
        probe: checks behaviour after the pull against what the push returned, or None.
        deadline_seconds: for each phase.
    """

    def __init__(
        self,
        *,
        push: Callable[[int], Awaitable[Update]],
        pulls: Sequence[Callable[[Update], Awaitable[None]]],
        probe: Callable[[int, Update], Awaitable[None]] | None,
        deadline_seconds: float,
    ) -> None:
        self._push = push
        self._pulls = list(pulls)
        self._probe = probe
        self._deadline = deadline_seconds

    async def push(self, version: int) -> Update:
        """Publish ``version``; on return the learner may go on. Raises WeightSyncError."""
        return await self._within("push from the policy learner", version, self._push(version))

    async def serve(self, version: int, update: Update) -> None:
        """On return every generator samples with ``version``; raises WeightSyncError."""
        await self._pull_everywhere(version, update)
        if self._probe is not None:
            await self._within("probe after the update", version, self._probe(version, update))

    async def _pull_everywhere(self, version: int, update: Update) -> None:
        """All generators at once; the first failure ends the other pulls before it is raised."""
        pulls = [
            asyncio.create_task(self._within(f"pull by generator {replica}", version, pull(update)))
            for replica, pull in enumerate(self._pulls)
        ]
        try:
            await asyncio.gather(*pulls)
        finally:
            for pulling in pulls:
                pulling.cancel()
            await asyncio.gather(*pulls, return_exceptions=True)

    async def _within(self, phase: str, version: int, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._deadline) as timeout:
                return await work
        except TimeoutError as error:
            why = f"took longer than weights.deadline_seconds={self._deadline:g}" if timeout.expired() else "timed out"
            raise WeightSyncError(f"weights version {version}: {phase} {why}") from error
