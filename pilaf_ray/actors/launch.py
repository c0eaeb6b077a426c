"""Creating the actors of a run and waiting until each is ready."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pilaf_ray.actors.handles import (
    GeneratorPool,
    LearnerGroup,
    OraclePool,
    ReferencePool,
    RewardGroup,
    StoreHandle,
    call,
)
from pilaf_ray.actors.people import PeoplePool
from pilaf_ray.actors.placement import Reservations
from pilaf_ray.actors.roles import (
    GeneratorActor,
    LearnerActor,
    OracleActor,
    ReferenceActor,
    RewardActor,
    StoreActor,
)

START_SECONDS = 900.0
"""Deadline for loading a model, generous because a cluster may pull weights over a network."""

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
    threads: int

    def options(self) -> dict[str, Any]:
        """Options for ``Actor.options``; roles are re-created by us, never by Ray."""
        allocator = {} if self.num_gpus else CPU_ALLOCATOR
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self.threads), **allocator}},
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

    @property
    def computing(
        self,
    ) -> dict[str, ComputingRole]:
        """The roles that compute, by the names under which their time and memory are reported."""
        roles: dict[str, ComputingRole] = {
            "generator": self.generators,
            "reference": self.reference,
            "oracle": self.oracle,
            "learner": self.learner,
        }
        return roles | ({"reward": self.reward} if self.reward else {})


class RoleLauncher:
    """Starts roles; all of them load at the same time.

    Args:
        logs: folder for one log file a role.
        call_seconds: deadline of each later call to a role.
        reservations: where replicas go; without them Ray puts each anywhere with room.
    """

    def __init__(self, *, logs: str, call_seconds: float, reservations: Reservations | None = None) -> None:
        self._logs = logs
        self._call_seconds = call_seconds
        self._reservations = reservations or Reservations(())

    async def generators(self, arguments: dict[str, Any], *, replicas: int, resources: RoleResources) -> GeneratorPool:
        """Start ``replicas`` generators."""
        actors = self._create(GeneratorActor, "generator", replicas, resources, arguments, concurrency=1000)
        await self._ready("generator", actors)
        return GeneratorPool(actors, call_seconds=self._call_seconds)

    async def reference(self, arguments: dict[str, Any], *, replicas: int, resources: RoleResources) -> ReferencePool:
        """Start ``replicas`` reference models."""
        actors = self._create(ReferenceActor, "reference", replicas, resources, arguments)
        await self._ready("reference", actors)
        return ReferencePool(actors, call_seconds=self._call_seconds)

    async def oracle(
        self, kind: str, arguments: dict[str, Any], *, replicas: int, resources: RoleResources, name: str = "oracle"
    ) -> OraclePool:
        """Start ``replicas`` preference oracles of type ``kind``; ``name`` is that of their reservation and logs."""
        actors = self._create(OracleActor, name, replicas, resources, kind, arguments)
        await self._ready(name, actors)
        return OraclePool(actors, call_seconds=self._call_seconds)

    async def learner(
        self,
        arguments: dict[str, Any],
        publisher: dict[str, Any],
        *,
        ranks: int,
        resources: RoleResources,
    ) -> LearnerGroup:
        """Start one learner group."""
        actors = await self._ranks(LearnerActor, "learner", ranks, resources, arguments, publisher)
        return LearnerGroup(actors, call_seconds=self._call_seconds)

    async def reward(self, arguments: dict[str, Any], *, ranks: int, resources: RoleResources) -> RewardGroup:
        """Start one group that trains and serves the reward model."""
        actors = await self._ranks(RewardActor, "reward", ranks, resources, arguments)
        return RewardGroup(actors, call_seconds=self._call_seconds)

    async def _ranks(
        self,
        factory: Any,
        role: str,
        ranks: int,
        resources: RoleResources,
        arguments: dict[str, Any],
        *more: Any,
    ) -> list[Any]:
        """One training group; rank 0's node chooses where the ranks meet."""
        actors = [
            factory.options(**{**resources.options(), **self._reservations.options(role, rank)}).remote(
                f"{role}-{rank}", self._logs, rank
            )
            for rank in range(ranks)
        ]
        address, port = await call(actors[0].rendezvous.remote(), role=f"{role} rank 0", seconds=START_SECONDS)
        full = {**arguments, "master_addr": address, "master_port": port}
        await self._ready(f"{role} rank", actors, full, *more)
        return actors

    async def store(self, url: str, namespace: str | None = None) -> StoreHandle:
        """Start the ledger's single writer."""
        actor = StoreActor.options(num_cpus=0, max_restarts=0).remote("store", self._logs, url, namespace)
        await self._ready("preference store", [actor])
        return StoreHandle(actor, call_seconds=self._call_seconds)

    def _create(
        self,
        factory: Any,
        role: str,
        replicas: int,
        resources: RoleResources,
        *arguments: Any,
        concurrency: int | None = None,
    ) -> list[Any]:
        options = resources.options()
        if concurrency is not None:
            options["max_concurrency"] = concurrency
        return [
            factory.options(**{**options, **self._reservations.options(role, replica)}).remote(
                f"{role}-{replica}", self._logs, *arguments
            )
            for replica in range(replicas)
        ]

    async def _ready(self, role: str, actors: Sequence[Any], *arguments: Any) -> None:
        await asyncio.gather(
            *(
                call(actor.start.remote(*arguments), role=f"{role} {number}", seconds=START_SECONDS)
                for number, actor in enumerate(actors)
            )
        )
