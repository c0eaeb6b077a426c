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
from pilaf_ray.heartbeat import Heartbeat
from pilaf_ray.pipeline.supervision import SupervisionPolicy

PATIENCE = 5.0
POLICY = SupervisionPolicy(first_pause=0.05, heartbeat_every=0.2, heartbeat_seconds=30.0, stuck_seconds=PATIENCE)
SLOW = (30, 0.2)
"""Parts of slow work, and seconds of each."""


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
    """All at once, for what is waited for is time."""
    events: list[tuple[str, dict[str, Any]]] = []
    goes_on, hangs, hangs_for_good = (tmp_path / name for name in ("goes on", "hangs", "hangs for good"))
    # Slow work is longer than a call may last; what hangs is found long before its call has lasted too long.
    call_seconds = {goes_on: PATIENCE, hangs: 60.0, hangs_for_good: 60.0}

    def report(event: str, **details: Any) -> None:
        events.append((event, details))

    async def start(folder: Path) -> list[Any]:
        folder.mkdir(exist_ok=True)
        actor = Worker.remote(folder)
        await call(actor.work.remote(0, 0.0), role="worker", seconds=60)
        return [actor]

    async def replace(_number: int) -> Any:
        (hangs / "hang").unlink()
        return (await start(hangs))[0]

    async def pool(role: str, folder: Path) -> ReplicaHandles:
        actors, seconds = await start(folder), call_seconds[folder]
        return ReplicaHandles(role, actors, spawn=replace, call_seconds=seconds, policy=POLICY, report=report)

    async def group(folder: Path) -> LearnerGroup:
        actors, seconds = await start(folder), call_seconds[folder]
        return LearnerGroup(actors, start=lambda: start(folder), call_seconds=seconds, policy=POLICY, report=report)

    slow, stuck, slow_rank, stuck_rank = await asyncio.gather(
        pool("oracle", goes_on), pool("reference", hangs), group(goes_on), group(hangs_for_good)
    )
    before = [await slow.ask("work", 0, 0.0), await stuck.ask("work", 0, 0.0)]
    for folder in (hangs, hangs_for_good):
        (folder / "hang").touch()
    began = time.monotonic()
    waited_for = asyncio.gather(slow.ask("work", *SLOW), slow_rank.everywhere("work", *SLOW))
    done_elsewhere = asyncio.ensure_future(stuck.ask("work", 1, 0.0))
    with pytest.raises(RoleLostError, match=r"policy learner rank 0 is stuck: .* no further with work for"):
        await stuck_rank.everywhere("work", 1, 0.0)
    after = [(await waited_for)[0], await asyncio.wait_for(done_elsewhere, 60)]
    assert time.monotonic() - began > PATIENCE, "longer than a role may stand still"
    assert after[0] == before[0] and after[1] != before[1]

    [lost] = [details for event, details in events if event == "replica lost"]
    assert lost["cause"].startswith("reference 0 is stuck: it answers, but got no further with work for")
    reported = {details["role"]: details for event, details in events if event == "stuck"}
    assert reported.keys() == {"reference 0", "policy learner rank 0"}
    assert all(details["idle_seconds"] > PATIENCE and details["work"] == "work" for details in reported.values())
    for role in (slow, stuck, slow_rank, stuck_rank):
        await role.close()
