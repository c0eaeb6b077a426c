"""Weight sync over Ray handles, with a behavioural probe."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pilaf_ray.actors.handles import call
from pilaf_ray.actors.launch import Roles
from pilaf_ray.data.collate import TokenPair
from pilaf_ray.errors import WeightSyncError
from pilaf_ray.pipeline.weight_sync import WeightSync


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedWeights:
    """A version that generators can fetch, and how the learner scores the probe with it."""

    ticket: Any
    probe_logprobs: list[list[float]]


def make_weight_sync(
    roles: Roles, *, probe_items: Sequence[TokenPair], tolerance: float | None, deadline_seconds: float
) -> WeightSync[PublishedWeights]:
    """Push from the learner group, pull by every generator, then compare what is served."""
    actors = roles.generators.actors

    async def push(version: int) -> PublishedWeights:
        # The learner's own answer is asked for now: when the generators have pulled, it has moved on.
        ticket = await roles.learner.publish(version)
        logprobs = [] if tolerance is None else await roles.learner.policy_logprobs(probe_items)
        return PublishedWeights(ticket=ticket, probe_logprobs=logprobs)

    def puller(actor: Any, replica: int) -> Callable[[PublishedWeights], Awaitable[None]]:
        async def pull(update: PublishedWeights) -> None:
            remote = actor.update_weights.remote(update.ticket, deadline_seconds)
            await call(remote, role=f"generator-{replica}", seconds=deadline_seconds)

        return pull

    async def probe(version: int, update: PublishedWeights) -> None:
        engines = await asyncio.gather(*(actor.score.remote(*item) for actor in actors for item in probe_items))
        for number, served in enumerate(engines):
            replica, item = divmod(number, len(probe_items))
            gap = max(abs(a - b) for a, b in zip(update.probe_logprobs[item], served, strict=True))
            if tolerance is not None and gap > tolerance:
                raise WeightSyncError(
                    f"weights version {version}: generator {replica} serves log-probabilities {gap:.3f} away from "
                    f"the learner's (weights.probe_tolerance={tolerance:g}); its weights are not what was sent"
                )

    return WeightSync(
        push=push,
        pulls=[puller(actor, replica) for replica, actor in enumerate(actors)],
        probe=probe if tolerance is not None else None,
        deadline_seconds=deadline_seconds,
    )
