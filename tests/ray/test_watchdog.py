"""Real actors that answer their heartbeat while they hang, or while they are slow."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pilaf_ray.actors.calls import call
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.learner_group import LearnerGroup
from pilaf_ray.actors.replica_handles import ReplicaHandles
from pilaf_ray.errors import RoleLostError
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.types import Heartbeat

PATIENCE = 2.5
POLICY = SupervisionPolicy(first_pause=0.05, heartbeat_every=0.2, heartbeat_seconds=30.0, stuck_seconds=PATIENCE)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(address=None, num_cpus=2):
        yield


@ray.remote(num_cpus=0, concurrency_groups={"watch": 1})
class Worker:
    """Works in parts, and in none while the folder holds a file ``hang``."""

    def __init__(self, folder: Path) -> None:
        from pilaf_ray.observability.progress import PROGRESS

        self._folder, self._progress = folder, PROGRESS

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def heartbeat(self) -> Heartbeat:
        return self._progress.beat(1.0)

    def work(self, parts: int, seconds: float) -> int:
        with self._progress.work("work"):
            for _ in range(parts):
                time.sleep(seconds)  # this is the work
                self._progress.advance()
            while (self._folder / "hang").exists():
                time.sleep(0.01)  # polling another process, not ordering work
            return os.getpid()


async def test_slow_work_is_waited_for_and_stuck_work_is_done_elsewhere(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    def report(event: str, **details: Any) -> None:
        events.append((event, details))

    async def start() -> list[Any]:
        actors = [Worker.remote(tmp_path) for _ in range(2)]
        await asyncio.gather(*(call(actor.work.remote(0, 0.0), role="worker", seconds=60) for actor in actors))
        return actors

    async def spawn(_number: int) -> Any:
        (tmp_path / "hang").unlink(missing_ok=True)
        return (await start())[0]

    pool = ReplicaHandles(
        "reference", [await spawn(0)], spawn=spawn, call_seconds=PATIENCE, policy=POLICY, report=report
    )
    group = LearnerGroup(await start(), start=start, call_seconds=60.0, policy=POLICY, report=report)
    slow = time.monotonic()
    first, ranks = await asyncio.gather(pool.ask("work", 20, 0.2), group.everywhere("work", 20, 0.2))
    assert time.monotonic() - slow > PATIENCE, "longer than a call may stand still"
    assert not events

    (tmp_path / "hang").touch()
    working = asyncio.ensure_future(pool.ask("work", 1, 0.0))
    with pytest.raises(RoleLostError, match=r"policy learner rank \d is stuck: .* no further with work for"):
        await group.everywhere("work", 1, 0.0)
    second = await asyncio.wait_for(working, 60)
    assert second not in (first, *ranks)
    [lost] = [details for event, details in events if event == "replica lost"]
    assert lost["cause"].startswith("reference 0 is stuck: it answers, but got no further with work for")
    stuck = {details["role"]: details for event, details in events if event == "stuck"}
    assert stuck["reference 0"]["work"] == "work"
    assert PATIENCE < stuck["reference 0"]["idle_seconds"] < 2 * PATIENCE + 30, "the machine may be slow, too"
    await pool.close()
    await group.close()
