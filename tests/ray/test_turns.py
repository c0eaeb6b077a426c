"""Generators and a learner group, as small actors, on one device in turns; some of them are killed on the way."""

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import ray

from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.generators import GeneratorPool
from pilaf_ray.actors.learner_group import LearnerGroup
from pilaf_ray.errors import RoleLostError
from pilaf_ray.heartbeat import Heartbeat
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.pipeline.turns import TurnTaking

POLICY = SupervisionPolicy(first_pause=0.05, longest_pause=0.2, heartbeat_every=0.2, heartbeat_seconds=30.0)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(address=None, num_cpus=2):
        yield


@ray.remote
class Device:
    """Who is on it, as the roles say themselves; the dead are taken off by those who killed them."""

    def __init__(self) -> None:
        self._there: dict[str, str] = {}
        self.faults: list[str] = []
        self.work: list[str] = []

    def take(self, role: str, name: str) -> None:
        others = [other for other, of in self._there.items() if of != role]
        if others:
            self.faults.append(f"{name} comes while {others} are there")
        self._there[name] = role

    def leave(self, name: str) -> None:
        self._there.pop(name, None)

    def compute(self, role: str, name: str) -> None:
        self.work.append(role)
        if name not in self._there or set(self._there.values()) != {role}:
            self.faults.append(f"{name} computes beside {self._there}")

    def report(self) -> tuple[list[str], list[str]]:
        return self.faults, self.work


@ray.remote(max_concurrency=20)
class Worker:
    """A generator, or a rank."""

    def __init__(self, device: Any, role: str, name: str) -> None:
        self._device, self._role, self._name = device, role, name

    async def start(self) -> None:
        await self._device.take.remote(self._role, self._name)

    async def heartbeat(self) -> Heartbeat:
        return Heartbeat(memory_mib=1.0)

    async def rest(self) -> None:
        await self._device.leave.remote(self._name)

    async def resume(self) -> None:
        await self._device.take.remote(self._role, self._name)

    async def generate(self, request: int) -> int:
        await self._device.compute.remote(self._role, self._name)
        return request

    async def train_step(self, step: int, _batch: Sequence[int]) -> int:
        await self._device.compute.remote(self._role, self._name)
        return step


class World:
    """What the launcher does, with workers for engines."""

    def __init__(self) -> None:
        self.device = Device.remote()  # type: ignore[attr-defined]
        self.turns = TurnTaking()
        self.events: list[str] = []
        self._started = 0

    async def _worker(self, role: str) -> Any:
        self._started += 1
        actor = Worker.remote(self.device, role, f"{role} no. {self._started}")  # type: ignore[attr-defined]
        await actor.start.remote()
        return actor

    async def generators(self, replicas: int) -> GeneratorPool:
        async with self.turns.turn("generator"):
            pool = GeneratorPool(
                await asyncio.gather(*(self._worker("generator") for _ in range(replicas))),
                spawn=lambda _number: self._worker("generator"),
                turn=partial(self.turns.turn, "generator"),
                joining=partial(self.turns.within, "generator"),
                call_seconds=30.0,
                policy=POLICY,
                report=lambda event, **_: self.events.append(event),
            )
            self.turns.join("generator", rest=pool.rest, resume=pool.resume)
        return pool

    async def learner(self) -> LearnerGroup:
        async def start() -> Sequence[Any]:
            self.turns.lost("learner")
            async with self.turns.turn("learner"):
                actors = [await self._worker("learner")]
                self.turns.join("learner", rest=lambda: group.rest(), resume=lambda: group.resume())
            return actors

        turn = partial(self.turns.within, "learner")
        actors = await start()
        group = LearnerGroup(actors, start=start, turn=turn, call_seconds=30.0, policy=POLICY)
        return group

    async def kill(self, actor: Any) -> None:
        """And take what it had off the device, as the end of a process does."""
        name = await actor.__ray_call__.remote(lambda worker: worker._name)
        ray.kill(actor)
        await self.device.leave.remote(name)


async def sample(pool: GeneratorPool, count: int) -> None:
    """As the controller does: all requests that the gate lets in, at once."""

    async def one(number: int) -> None:
        async with pool._turn():
            assert await pool.ask("generate", number, pairs=[f"pair-{number}"]) == number

    await asyncio.gather(*(one(number) for number in range(count)))


async def step(world: World, learner: LearnerGroup, number: int) -> None:
    async with world.turns.turn("learner"):
        assert await learner.everywhere("train_step", number, []) == [number]


async def test_generators_and_a_learner_never_meet_and_the_lost_ones_come_back_in_their_turn() -> None:
    world = World()
    pool, learner = await asyncio.gather(world.generators(2), world.learner())
    # Both at once, over and over: who asks first goes first.
    await asyncio.gather(*(work for n in range(4) for work in (sample(pool, 6), step(world, learner, n))))

    # A generator that dies at rest is replaced in the generators' turn, not in the learner's.
    async with world.turns.turn("learner"):
        lost = pool.actors[0]
        await world.kill(lost)
        await learner.everywhere("train_step", 4, [])
    async with asyncio.timeout(60):
        while pool.actors.get(0) in (None, lost):
            await asyncio.gather(sample(pool, 4), step(world, learner, 5))
    assert "replica replaced" in world.events

    # A learner that dies in its turn: the generators go on, and it is started again in a turn of its own.
    async with world.turns.turn("learner"):
        await world.kill(learner._actors[0])
        with pytest.raises(RoleLostError):
            await learner.everywhere("train_step", 6, [])
    await sample(pool, 4)
    sampling = asyncio.gather(*(sample(pool, 4) for _ in range(4)))
    await asyncio.gather(learner.rebuild(), sampling)
    await step(world, learner, 7)
    await sample(pool, 4)

    faults, work = await world.device.report.remote()
    assert not faults
    assert work.count("generator") >= 4 * 6 + 4 + 4 + 16 + 4 and work.count("learner") >= 7
    await pool.close()
    await learner.close()
    await world.turns.close()
