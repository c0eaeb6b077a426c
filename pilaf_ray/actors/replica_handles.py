"""What the adapters of all replicated roles share, between Ray's actor handles and the ports of the pipeline.

Each counts the time its role is busy, as seen from the controller, gives every call a deadline, looks whether replicas
get on with their work (``pipeline/supervision.py``), and replaces those that are lost (``pipeline/replicas.py``).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pilaf_ray.actors.calls import call, end_actor
from pilaf_ray.heartbeat import Heartbeat
from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.observability.run_status import Pulse, ReplicaStatus
from pilaf_ray.pipeline.replicas import ReplicaPool
from pilaf_ray.pipeline.supervision import ProgressWatch, Report, SupervisionPolicy, no_report
from pilaf_ray.types import RoleUsage

Spawn = Callable[[int], Awaitable[Any]]
"""``await spawn(n)`` starts replica number n and returns its handle once it is ready."""


class ReplicaHandles:
    """What the adapters of replicated roles share."""

    def __init__(
        self,
        role: str,
        actors: Sequence[Any],
        *,
        spawn: Spawn,
        call_seconds: float,
        policy: SupervisionPolicy,
        report: Report = no_report,
    ) -> None:
        self._role = role
        self._seconds = call_seconds
        self._report = report
        self._policy = policy
        self.meter = BusyMeter()
        self._pulses: dict[Any, Pulse] = {}
        self._watches: dict[Any, ProgressWatch] = {}
        self._pool: ReplicaPool[Any] = ReplicaPool(
            role, actors, replace=spawn, end=end_actor, ping=self._ping, policy=policy, report=report
        )

    async def _ping(self, actor: Any) -> None:
        # The pool has its own, shorter patience.
        beat: Heartbeat = await call(actor.heartbeat.remote(), role=self._role, seconds=self._seconds)
        self._pulses[actor] = Pulse(time=time.time(), memory_mib=beat.memory_mib)
        number = next((number for number, replica in self._pool.living().items() if replica is actor), None)
        if number is not None:
            self._watch(actor, number).heard(beat)

    def _watch(self, actor: Any, number: int) -> ProgressWatch:
        if actor not in self._watches:
            name = f"{self._role} {number}"
            self._watches[actor] = ProgressWatch(name, policy=self._policy, report=self._report)
        return self._watches[actor]

    @property
    def replicas(self) -> list[ReplicaStatus]:
        """Each replica and its newest heartbeat."""
        living = self._pool.living()
        self._pulses = {actor: pulse for actor, pulse in self._pulses.items() if actor in living.values()}
        self._watches = {actor: watch for actor, watch in self._watches.items() if actor in living.values()}
        return [
            ReplicaStatus(number=number, serving=number in living, pulse=self._pulses.get(living.get(number)))
            for number in self._pool.numbers
        ]

    async def ask(self, method: str, *arguments: Any, pairs: Sequence[str] = ()) -> Any:
        """Call ``method`` on the least loaded replica; ``pairs`` are the ids of the pairs it is about."""

        async def work(actor: Any, replica: int) -> Any:
            remote = getattr(actor, method).remote(*arguments)
            watch = self._watch(actor, replica)
            return await call(remote, role=f"{self._role}-{replica}", seconds=self._seconds, name=method, watch=watch)

        with self.meter.call():
            return await self._pool.run(work, pairs=pairs)

    async def usage(self) -> list[RoleUsage]:
        """Busy time and memory of each replica that lives."""
        answers = await asyncio.gather(
            *(
                call(actor.usage.remote(), role=f"{self._role}-{number}", seconds=self._seconds)
                for number, actor in self._pool.living().items()
            ),
            return_exceptions=True,
        )
        return [answer for answer in answers if isinstance(answer, RoleUsage)]

    async def close(self) -> None:
        """Stop watching the replicas."""
        await self._pool.close()
