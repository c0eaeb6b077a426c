"""Saved policies, one after the other, in generators that start once."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pilaf_ray.actors.calls import call
from pilaf_ray.actors.generators import GeneratorPool
from pilaf_ray.engines.saved_policy import can_take_over, saved_policy
from pilaf_ray.engines.weight_tickets import WeightUpdate
from pilaf_ray.errors import RoleLostError


class SavedPolicies:
    """Generators that serve the policy that is asked for.

    The next policy takes the place of the one before; they are started anew only for one that cannot.

    Args:
        start: starts generators with the policy of a Hugging Face folder.
        deadline_seconds: for an engine to take another policy over.
    """

    def __init__(self, start: Callable[[Path], Awaitable[GeneratorPool]], *, deadline_seconds: float) -> None:
        self._start, self._deadline = start, deadline_seconds
        self._generators: GeneratorPool | None = None
        self._serving: Path | None = None
        self._changes = 0

    async def serve(self, model: Path) -> GeneratorPool:
        """Generators of the policy in ``model``; those of an earlier call serve it too from now on, or have ended.

        Raises:
            WeightSyncError: its weights cannot be read, or are not those of its network.
        """
        if self._generators is not None and self._serving is not None and can_take_over(self._serving, model):
            self._changes += 1
            ticket = await asyncio.to_thread(saved_policy, model, version=self._changes)
            await self._take_over(self._generators, ticket)
        else:
            await self.stop()
            self._generators, self._serving = await self._start(model), model
        return self._generators

    async def _take_over(self, generators: GeneratorPool, ticket: WeightUpdate) -> None:
        async def one(number: int, actor: Any) -> None:
            try:
                await generators.unless_lost(number, self._pull(actor, number, ticket))
            except RoleLostError as error:
                # What takes its place pulls before it samples.
                if generators.actors.get(number) is actor:
                    generators.lose(number, error)

        generators.follow(self._pull, ticket)
        await asyncio.gather(*(one(number, actor) for number, actor in generators.actors.items()))

    async def _pull(self, actor: Any, number: int, ticket: WeightUpdate) -> None:
        remote = actor.update_weights.remote(ticket, self._deadline)
        await call(remote, role=f"generator-{number}", seconds=self._deadline, name="update_weights")

    async def stop(self) -> None:
        """End the generators, if any run."""
        generators, self._generators = self._generators, None
        if generators is not None:
            await generators.stop()
