"""How many generators a run has while it goes on."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from pilaf_ray.actors.elastic import view_cluster
from pilaf_ray.actors.launch import Roles
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.pipeline.node_following import NodeFollower
from pilaf_ray.pipeline.scaling import scaled_on_request
from pilaf_ray.pipeline.supervision import Report


@contextlib.asynccontextmanager
async def follow_numbers(config: RunConfig, roles: Roles, run: Path, *, report: Report) -> AsyncIterator[None]:
    """While the block runs, their number follows requests in the run folder and, if elastic, the cluster's nodes."""
    elastic, resize = config.generation.elastic, roles.generators.resize
    async with contextlib.AsyncExitStack() as stack:
        if elastic is not None:
            follower = NodeFollower(
                pool=roles.generators,
                look=lambda: view_cluster(roles.generators, roles.reservations),
                least=elastic.least,
                most=elastic.most,
                report=report,
            )
            await stack.enter_async_context(follower.following())
            resize = follower.resize
        await stack.enter_async_context(scaled_on_request(run, resize, report=report))
        yield
