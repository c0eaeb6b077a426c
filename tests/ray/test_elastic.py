"""Generators that follow the nodes of a real cluster: one that comes, one that is drained, one that is lost."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pilaf_ray.actors.calls import call
from pilaf_ray.actors.elastic import view_cluster
from pilaf_ray.actors.generators import GeneratorPool
from pilaf_ray.actors.placement import Reservations, cluster_nodes
from pilaf_ray.heartbeat import Heartbeat
from pilaf_ray.pipeline.node_following import NodeFollower
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.placement import RoleRequest, make_groups, plan_placement
from pilaf_ray.types import GenerationRequest

POLICY = SupervisionPolicy(first_pause=0.05, longest_pause=0.2, heartbeat_every=0.2, heartbeat_seconds=30.0)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@ray.remote(num_cpus=1)
class HeldGenerator:
    """Answers with its node while the folder holds no file ``hold``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(memory_mib=1.0)

    def generate(self, request: GenerationRequest) -> str:
        (self._folder / f"asked-{request.pair_id}-{os.getpid()}").touch()
        while (self._folder / "hold").exists():
            time.sleep(0.01)  # polling another process, not ordering work
        return self.node()


def drain(cluster: Cluster, node: str) -> None:
    words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--node-id", node]
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address, *words]
    subprocess.run([*command, "--deadline-remaining-seconds", "600"], check=True, capture_output=True)


async def until(condition: Callable[[], object], step: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await step()
            await asyncio.sleep(0.1)


async def test_generators_follow_nodes_that_come_are_drained_and_are_lost(cluster: Cluster, tmp_path: Path) -> None:
    events = list[tuple[str, dict[str, Any]]]()
    plan = plan_placement(make_groups([RoleRequest(role="generator", replicas=1, cpus=1.0)]), cluster_nodes())
    reservations = Reservations(plan.groups)
    await reservations.acquire(seconds=60)

    async def spawn(number: int) -> Any:
        await reservations.join("generator", number)
        await reservations.granted("generator", number)
        actor = HeldGenerator.options(  # type: ignore[attr-defined]
            **reservations.options("generator", number), max_concurrency=10
        ).remote(tmp_path)
        await call(actor.node.remote(), role=f"generator {number}", seconds=60)
        return actor

    report = lambda event, **details: events.append((event, details))  # noqa: E731
    pool = GeneratorPool(
        [await spawn(0)],
        spawn=spawn,
        leave=lambda number: reservations.leave("generator", number),
        call_seconds=60.0,
        policy=POLICY,
        report=report,
    )
    look = lambda: view_cluster(pool, reservations)  # noqa: E731
    follower = NodeFollower(pool=pool, look=look, least=1, most=2, report=report)

    async def answers(*names: str) -> list[Any]:
        requests = [
            GenerationRequest(request_id=f"{name}-a", prompt_token_ids=(1,), coefficient=0.0, seed=0) for name in names
        ]
        return await asyncio.wait_for(asyncio.gather(*map(pool.generate, requests)), 60)

    await follower.step()
    assert sorted(pool.actors) == [0], "there is no room"
    # A node comes.
    second = cluster.add_node(num_cpus=1)
    await until(lambda: len(pool.actors) == 2, follower.step)
    assert (await pool.nodes())[1] == second.node_id
    # It is drained while each generator has a response under way.
    (tmp_path / "hold").touch()
    held = asyncio.ensure_future(answers("pair-0", "pair-1"))
    await until(lambda: len(list(tmp_path.glob("asked-*"))) == 2, lambda: asyncio.sleep(0))
    drain(cluster, second.node_id)
    await until(lambda: sorted(pool.actors) == [0], follower.step)
    (tmp_path / "hold").unlink()
    first = (await pool.nodes())[0]
    assert await held == [first, first], "what it was doing is done by the one that stays"
    assert ("replica removed", {"role": "generator", "replica": 1, "handed_back": 1}) in events
    await follower.step()
    assert sorted(pool.actors) == [0], "nobody goes back to a node that leaves"
    cluster.remove_node(second)
    # Another one comes, and then the first is lost at once.
    third = cluster.add_node(num_cpus=1)
    await until(lambda: len(pool.actors) == 2, follower.step)
    cluster.remove_node(next(node for node in cluster.worker_nodes if node.node_id == first), allow_graceful=False)
    await until(lambda: 0 not in pool.numbers, follower.step)
    assert await answers("pair-2") == [third.node_id]
    assert not [event for event, _ in events if event == "given up"]
    # Its place comes back with a fourth node, and it in it.
    cluster.add_node(num_cpus=1)
    await until(lambda: sorted(pool.actors) == [0, 1], follower.step)
    await pool.close()
    reservations.release()
