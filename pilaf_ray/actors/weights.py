"""Weight sync over Ray handles, with a behavioural probe."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pilaf_ray.actors.handles import call
from pilaf_ray.actors.launch import Roles
from pilaf_ray.data.collate import TokenPair
from pilaf_ray.errors import WeightSyncError
from pilaf_ray.pipeline.weight_sync import WeightSync


def make_weight_sync(
    roles: Roles, *, probe_items: Sequence[TokenPair], tolerance: float | None, deadline_seconds: float
) -> WeightSync[Any]:
    """Push from the learner group, pull by every generator, then compare what is served."""
    actors = roles.generators.actors

    def puller(actor: Any, replica: int) -> Callable[[Any], Awaitable[None]]:
        async def pull(update: Any) -> None:
            remote = actor.update_weights.remote(update, deadline_seconds)
            await call(remote, role=f"generator-{replica}", seconds=deadline_seconds)

        return pull

    async def probe(version: int) -> None:
        learner, *engines = await asyncio.gather(
            roles.learner.policy_logprobs(probe_items),
            *(actor.score.remote(*item) for actor in actors for item in probe_items),
        )
        for number, served in enumerate(engines):
            replica, item = divmod(number, len(probe_items))
            gap = max(abs(a - b) for a, b in zip(learner[item], served, strict=True))
            if tolerance is not None and gap > tolerance:
                raise WeightSyncError(
                    f"weights version {version}: generator {replica} serves log-probabilities {gap:.3f} away from "
                    f"the learner's (weights.probe_tolerance={tolerance:g}); its weights are not what was sent"
                )

    return WeightSync(
        push=roles.learner.publish,
        pulls=[puller(actor, replica) for replica, actor in enumerate(actors)],
        probe=probe if tolerance is not None else None,
        deadline_seconds=deadline_seconds,
    )
