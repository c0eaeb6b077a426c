"""The adapter of the generators: they pull weights, grow and shrink, and may share their devices."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any

from pilaf_ray.actors.calls import call, end_actor
from pilaf_ray.actors.replica_handles import ReplicaHandles, Spawn
from pilaf_ray.errors import PilafError, RoleLostError
from pilaf_ray.pipeline.turns import Turn, own_device
from pilaf_ray.types import (
    GenerationRequest,
    SampledResponse,
)

PullWeights = Callable[[Any, int, Any], Awaitable[None]]
"""``await pull(actor, number, update)`` returns once that generator serves the update."""


class GeneratorPool(ReplicaHandles):
    """Generator replicas behind one face; a newcomer pulls the newest weights before it samples.

    Args:
        turn: in which requests are sent, where the learner shares the generators' devices.
        joining: in which a newcomer starts, which requests may wait for.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        *,
        spawn: Spawn,
        leave: Callable[[int], None] = lambda _number: None,
        turn: Turn = own_device,
        joining: Turn = own_device,
        **settings: Any,
    ) -> None:
        self._spawn, self._leave = spawn, leave
        self._turn, self._joining = turn, joining
        self._attempts = count()
        self._newest: tuple[PullWeights, Any] | None = None
        self._nodes: dict[Any, str] = {}
        super().__init__("generator", actors, spawn=self._newcomer, **settings)

    @property
    def actors(self) -> dict[int, Any]:
        """The replicas that sample now, by number."""
        return self._pool.living()

    def lose(self, number: int, error: RoleLostError) -> None:
        """Replace a generator that nobody can update."""
        self._pool.lose(number, error)

    async def unless_lost(self, number: int, work: Awaitable[None]) -> None:
        """Await ``work`` of generator ``number``; raises RoleLostError once that generator is given up."""
        await self._pool.unless_lost(number, work)

    def follow(self, pull: PullWeights, update: Any) -> None:
        """From now on newcomers serve ``update``; the caller sees to those that sample already."""
        self._newest = (pull, update)

    def follows(self, update: Any) -> bool:
        """Whether newcomers are to serve ``update``, or another by now."""
        return self._newest is not None and self._newest[1] is update

    def forget_weights(self) -> None:
        """The newest update is worthless: its publisher is gone."""
        self._newest = None

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        """Sample one response, on whichever replica lives to finish it."""
        # An engine refuses a name that is still under way, as an earlier attempt may be.
        named = dataclasses.replace(request, request_id=f"{request.request_id}.{next(self._attempts)}")
        async with self._turn():
            response: SampledResponse = await self.ask("generate", named, pairs=[request.pair_id])
        return response

    async def rest(self) -> None:
        """Free the devices; requests that nobody waits for are dropped."""
        await self._everywhere("rest")

    async def resume(self) -> None:
        """Take the devices again, with the weights that were served before."""
        await self._everywhere("resume")

    async def _everywhere(self, method: str) -> None:
        """Call ``method`` on each replica; one that does not answer is replaced."""

        async def one(number: int, actor: Any) -> None:
            work = call(getattr(actor, method).remote(), role=f"generator-{number}", seconds=self._seconds)
            try:
                await self.unless_lost(number, work)
            except RoleLostError as error:
                if self.actors.get(number) is actor:
                    self.lose(number, error)

        await asyncio.gather(*(one(number, actor) for number, actor in self.actors.items()))

    async def _newcomer(self, number: int) -> Any:
        async with self._joining():
            return await self._started(number)

    async def _started(self, number: int) -> Any:
        actor = await self._spawn(number)
        served: object = None
        try:
            while self._newest is not None and self._newest is not served:
                served = self._newest
                pull, update = self._newest
                try:
                    await pull(actor, number, update)
                except PilafError:
                    # Of a learner that was lost meanwhile; what is newest now, if anything is, decides.
                    if self._newest is served:
                        raise
        except BaseException:
            await end_actor(actor)
            raise
        return actor

    async def resize(self, replicas: int) -> int:
        """Start or end generators until there are ``replicas``; returns how many there are.

        One that does not start is reported and done without.
        """
        assert replicas >= 1, "somebody must do the work"
        await self.add([None] * (replicas - len(self._pool)))
        while replicas < len(self._pool):
            await self.remove()
        return len(self._pool)

    async def add(self, numbers: Sequence[int | None]) -> None:
        """Start a generator for each number (None: the lowest that is free); one that does not start is reported."""
        growing = [self._pool.grow(number) for number in numbers]
        for found in await asyncio.gather(*growing, return_exceptions=True):
            if isinstance(found, PilafError):
                self._report("generator not added", cause=str(found))
            elif isinstance(found, BaseException):
                raise found

    async def remove(self, number: int | None = None) -> None:
        """End one generator, the last when left out; it hands its work back first, and its own reservation.

        Nothing happens where somebody else has removed it meanwhile, or where it is the only one by now.
        """
        if len(self._pool) == 1 or (number is not None and number not in self._pool.numbers):
            return
        self._leave(await self._pool.shrink(number))

    @property
    def lost(self) -> frozenset[int]:
        """Generators that were lost and are being replaced."""
        return self._pool.lost

    @property
    def numbers(self) -> list[int]:
        """All generators, those that are being replaced included."""
        return self._pool.numbers

    async def nodes(self) -> dict[int, str | None]:
        """Ray's id of the node of each generator, by number; None while it is being replaced."""
        living = self._pool.living()
        for number, actor in living.items():
            if actor not in self._nodes:
                asked = call(actor.node.remote(), role=f"generator-{number}", seconds=self._seconds)
                # One that dies just now is on no node; its heartbeat says so to those who replace it.
                with contextlib.suppress(RoleLostError):
                    self._nodes[actor] = await asked
        self._nodes = {actor: node for actor, node in self._nodes.items() if actor in living.values()}
        return {number: self._nodes.get(living.get(number)) for number in self._pool.numbers}

    async def stop(self) -> None:
        """End the replicas and give their memory back."""
        await self.close()
        for number, actor in self.actors.items():
            await call(actor.stop.remote(), role=f"generator-{number}", seconds=self._seconds)
            await end_actor(actor)
