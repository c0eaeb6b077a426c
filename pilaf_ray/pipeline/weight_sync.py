"""The order of a weight update, and nothing else: push, pull, probe.

The caller releases the gate's slots after :meth:`WeightSync.serve` returns.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from pilaf_ray.errors import RoleLostError, WeightSyncError
from pilaf_ray.pipeline.turns import Turn, own_device

Update = TypeVar("Update")
T = TypeVar("T")
Pull = Callable[[Update], Awaitable[None]]


class WeightSync(Generic[Update]):
    """Moves one version at a time from the learner to every generator.

    Args:
        push: publishes a version and returns what is needed to fetch and recognise it.
        announce: told of an update before anybody pulls it, so that generators that join meanwhile pull it.
        pulls: one callable for each generator that samples now; returns once it serves the version.
        recover: what becomes of a generator that failed to pull; None to raise its error.
        probe: checks behaviour after the pull against what the push returned, or None.
        deadline_seconds: for each phase.
        push_turn: the learner's on a device that it shares with the generators.
        serve_turn: the generators' on it.
    """

    def __init__(
        self,
        *,
        push: Callable[[int], Awaitable[Update]],
        pulls: Callable[[], Mapping[int, Pull[Update]]],
        probe: Callable[[int, Update], Awaitable[None]] | None,
        deadline_seconds: float,
        announce: Callable[[Update], None] | None = None,
        recover: Callable[[int, Update, Exception], Awaitable[None]] | None = None,
        push_turn: Turn = own_device,
        serve_turn: Turn = own_device,
    ) -> None:
        self._push = push
        self._announce = announce
        self._pulls = pulls
        self._recover = recover
        self._probe = probe
        self._deadline = deadline_seconds
        self._push_turn, self._serve_turn = push_turn, serve_turn

    async def push(self, version: int) -> Update:
        """Publish ``version``; on return the learner may go on. Raises WeightSyncError."""
        async with self._push_turn():
            return await self._within("push from the policy learner", version, self._push(version))

    async def serve(self, version: int, update: Update) -> None:
        """On return every generator samples with ``version``; raises WeightSyncError."""
        if self._announce is not None:
            self._announce(update)
        async with self._serve_turn():
            await self._pull_everywhere(version, update)
            if self._probe is not None:
                await self._within("probe after the update", version, self._probe(version, update))

    async def _pull_everywhere(self, version: int, update: Update) -> None:
        """All generators at once; the first failure ends the other pulls before it is raised."""
        pulls = [
            asyncio.create_task(self._pull(replica, pull, version, update)) for replica, pull in self._pulls().items()
        ]
        try:
            await asyncio.gather(*pulls)
        finally:
            for pulling in pulls:
                pulling.cancel()
            await asyncio.gather(*pulls, return_exceptions=True)

    async def _pull(self, replica: int, pull: Pull[Update], version: int, update: Update) -> None:
        try:
            await self._within(f"pull by generator {replica}", version, pull(update))
        except (WeightSyncError, RoleLostError) as error:
            if self._recover is None:
                raise
            await self._recover(replica, update, error)

    async def _within(self, phase: str, version: int, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._deadline) as timeout:
                return await work
        except TimeoutError as error:
            why = f"took longer than weights.deadline_seconds={self._deadline:g}" if timeout.expired() else "timed out"
            raise WeightSyncError(f"weights version {version}: {phase} {why}") from error
