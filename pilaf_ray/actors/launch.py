"""Creating the actors of a run and waiting until each is ready."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from pilaf_ray.actors.calls import call, end_actor
from pilaf_ray.actors.generators import GeneratorPool
from pilaf_ray.actors.handles import OraclePool, ReferencePool, StoreHandle
from pilaf_ray.actors.learner_group import LearnerGroup, RewardGroup, StartGroup
from pilaf_ray.actors.people import PeoplePool
from pilaf_ray.actors.placement import Reservations, store_place
from pilaf_ray.actors.replica_handles import Spawn
from pilaf_ray.actors.roles import (
    GeneratorActor,
    LearnerActor,
    OracleActor,
    ReferenceActor,
    RewardActor,
    StoreActor,
)
from pilaf_ray.engines.model_store import names_url
from pilaf_ray.pipeline.supervision import Report, SupervisionPolicy, no_report
from pilaf_ray.pipeline.turns import TurnTaking
from pilaf_ray.threads import Threads, starting_threads

START_SECONDS = 900.0
"""Deadline for loading a model, generous because a cluster may pull weights over a network."""

FETCH_SECONDS = 7200.0
"""Deadline for fetching models of URLs to a node, beside that for loading them."""

# glibc gives every large tensor's memory back to the kernel and faults it in again, page by page, for the next
# one. On CPUs, where activations live in that memory, this slows a training step. Other C libraries
# ignore these variables.
CPU_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleResources:
    """What one replica asks of Ray, and how many threads its process may use."""

    num_cpus: float
    num_gpus: float
    threads: Threads

    def options(self) -> dict[str, Any]:
        """Options for ``Actor.options``; roles are re-created by us, never by Ray."""
        allocator = {} if self.num_gpus else CPU_ALLOCATOR
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(starting_threads(self.threads)), **allocator}},
        }


ComputingRole = GeneratorPool | ReferencePool | OraclePool | PeoplePool | LearnerGroup | RewardGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """Every role of a running job, as the pipeline sees them."""

    generators: GeneratorPool
    reference: ReferencePool
    oracle: OraclePool | PeoplePool
    learner: LearnerGroup
    store: StoreHandle
    reward: RewardGroup | None = None
    console: ActorHandle | None = None
    """Kept, because Ray ends an actor that nobody holds."""
    reservations: Reservations = field(default_factory=lambda: Reservations(()))
    """Where the roles have their places."""
    turns: TurnTaking | None = None
    """Where generators and learner use the same devices in turns."""

    @property
    def computing(self) -> dict[str, ComputingRole]:
        """The roles that compute, by the names under which their time and memory are reported."""
        roles: dict[str, ComputingRole] = {
            "generator": self.generators,
            "reference": self.reference,
            "oracle": self.oracle,
            "learner": self.learner,
        }
        return roles | ({"reward": self.reward} if self.reward else {})

    async def close(self) -> None:
        """Stop watching them."""
        if self.turns is not None:
            await self.turns.close()
        for role in (*self.computing.values(), self.store):
            await role.close()


class RoleLauncher:
    """Starts roles, now and again when one is lost; all of them load at the same time.

    Args:
        logs: folder for one log file a role.
        call_seconds: deadline of each later call to a role.
        reservations: where replicas go; without them Ray puts each anywhere with room.
        policy: how patient the run is with its roles.
        outage_seconds: how long an oracle may be out of reach.
        report: told of losses and recoveries.
        turns: where generators and learner use the same devices; None where each has its own.
    """

    def __init__(
        self,
        *,
        logs: str,
        call_seconds: float,
        reservations: Reservations | None = None,
        policy: SupervisionPolicy | None = None,
        outage_seconds: float = 300.0,
        report: Report = no_report,
        turns: TurnTaking | None = None,
    ) -> None:
        self._logs = logs
        self._call_seconds = call_seconds
        self._reservations = reservations or Reservations(())
        self._policy = policy or SupervisionPolicy()
        self._outage_seconds = outage_seconds
        self._report = report
        self._turns = turns

    @property
    def _supervised(self) -> dict[str, Any]:
        return {"call_seconds": self._call_seconds, "policy": self._policy, "report": self._report}

    async def generators(self, arguments: dict[str, Any], *, replicas: int, resources: RoleResources) -> GeneratorPool:
        """Start ``replicas`` generators; later ones reserve for themselves what these have."""
        spawn = self._spawner(GeneratorActor, "generator", resources, arguments, concurrency=1000)

        async def join(number: int) -> Any:
            reserved = await self._reservations.join("generator", number)
            try:
                return await spawn(number)
            except BaseException:
                if reserved:
                    self._reservations.leave("generator", number)
                raise

        settings = {
            "spawn": join,
            "leave": lambda number: self._reservations.leave("generator", number),
            **self._supervised,
        }
        turns = self._turns
        if turns is None:
            return GeneratorPool(await _all(spawn, replicas), **settings)
        turn, joining = partial(turns.turn, "generator"), partial(turns.within, "generator")
        async with turn():
            pool = GeneratorPool(await _all(spawn, replicas), turn=turn, joining=joining, **settings)
            turns.join("generator", rest=pool.rest, resume=pool.resume)
        return pool

    async def reference(self, arguments: dict[str, Any], *, replicas: int, resources: RoleResources) -> ReferencePool:
        """Start ``replicas`` reference models."""
        spawn = self._spawner(ReferenceActor, "reference", resources, arguments)
        return ReferencePool(await _all(spawn, replicas), spawn=spawn, **self._supervised)

    async def oracle(
        self, kind: str, arguments: dict[str, Any], *, replicas: int, resources: RoleResources, name: str = "oracle"
    ) -> OraclePool:
        """Start ``replicas`` preference oracles of type ``kind``; ``name`` is that of their reservation and logs."""
        spawn = self._spawner(OracleActor, name, resources, kind, arguments)
        actors = await _all(spawn, replicas)
        return OraclePool(actors, spawn=spawn, name=name, outage_seconds=self._outage_seconds, **self._supervised)

    async def learner(
        self,
        arguments: dict[str, Any],
        publisher: dict[str, Any],
        *,
        ranks: int,
        resources: RoleResources,
    ) -> LearnerGroup:
        """Start one learner group."""
        start = self._starter(LearnerActor, "learner", ranks, resources, arguments, publisher)
        turns = self._turns
        if turns is None:
            return LearnerGroup(await start(), start=start, **self._supervised)

        async def start_in_turn() -> Sequence[Any]:
            turns.lost("learner")
            async with turns.turn("learner"):
                actors = await start()
                turns.join("learner", rest=lambda: group.rest(), resume=lambda: group.resume())
                return actors

        actors = await start_in_turn()
        group = LearnerGroup(actors, start=start_in_turn, turn=partial(turns.within, "learner"), **self._supervised)
        return group

    async def reward(self, arguments: dict[str, Any], *, ranks: int, resources: RoleResources) -> RewardGroup:
        """Start one group that trains and serves the reward model."""
        start = self._starter(RewardActor, "reward", ranks, resources, arguments)
        return RewardGroup(await start(), start=start, **self._supervised)

    def _starter(
        self, factory: Any, role: str, ranks: int, resources: RoleResources, arguments: dict[str, Any], *more: Any
    ) -> StartGroup:
        """What starts one training group; rank 0's node chooses where the ranks meet."""

        async def start() -> list[Any]:
            await self._reservations.granted(role, 0)
            actors = [self._create(factory, role, rank, resources, rank) for rank in range(ranks)]
            try:
                if names_url(arguments):
                    # Before they meet: ranks of a node that has the model would wait for the others in a collective.
                    fetched = (actor.fetch.remote(arguments) for actor in actors)
                    await asyncio.gather(*(call(f, role=role, seconds=FETCH_SECONDS) for f in fetched))
                meet = actors[0].rendezvous.remote()
                address, port = await call(meet, role=f"{role} rank 0", seconds=START_SECONDS)
                full = {**arguments, "master_addr": address, "master_port": port}
                await asyncio.gather(
                    *(
                        call(actor.start.remote(full, *more), role=f"{role} rank {rank}", seconds=START_SECONDS)
                        for rank, actor in enumerate(actors)
                    )
                )
            except BaseException:
                for actor in actors:
                    await end_actor(actor)
                raise
            return actors

        return start

    async def store(self, url: str, namespace: str | None = None) -> StoreHandle:
        """Start the ledger's single writer, under a name by which other actors find the one that lives now."""
        name = f"preference-store-{uuid4().hex}"

        # The name of a writer that has ended is free a moment later.
        @retry(
            retry=retry_if_exception_type(ActorAlreadyExistsError),
            stop=stop_after_delay(START_SECONDS),
            wait=wait_fixed(0.1),
            reraise=True,
        )
        async def create() -> Any:
            options = {"name": name, "num_cpus": 0, "max_restarts": 0, **store_place(url)}
            return StoreActor.options(**options).remote("store", self._logs, url, namespace)

        async def spawn(_number: int) -> Any:
            actor = await create()
            try:
                await call(actor.start.remote(), role="preference store", seconds=START_SECONDS)
            except BaseException:
                # Its name is the next one's.
                await end_actor(actor)
                raise
            return actor

        return StoreHandle(await spawn(0), name=name, spawn=spawn, **self._supervised)

    def _spawner(
        self, factory: Any, role: str, resources: RoleResources, *arguments: Any, concurrency: int | None = None
    ) -> Spawn:
        """What starts replica n of a role, in the place that was reserved for it."""

        fetches = any(isinstance(each, dict) and names_url(each) for each in arguments)
        seconds = START_SECONDS + FETCH_SECONDS * fetches

        async def spawn(number: int) -> Any:
            await self._reservations.granted(role, number)
            actor = self._create(factory, role, number, resources, *arguments, concurrency=concurrency)
            try:
                await call(actor.start.remote(), role=f"{role} {number}", seconds=seconds)
            except BaseException:
                await end_actor(actor)
                raise
            return actor

        return spawn

    def _create(
        self,
        factory: Any,
        role: str,
        replica: int,
        resources: RoleResources,
        *arguments: Any,
        concurrency: int | None = None,
    ) -> Any:
        options = {**resources.options(), **self._reservations.options(role, replica)}
        if concurrency is not None:
            options["max_concurrency"] = concurrency
        return factory.options(**options).remote(f"{role}-{replica}", self._logs, *arguments)


async def _all(spawn: Spawn, replicas: int) -> list[Any]:
    return list(await asyncio.gather(*(spawn(number) for number in range(replicas))))
