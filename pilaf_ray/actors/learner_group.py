"""The ranks of a learner, which live and die together."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray

from pilaf_ray.actors.calls import RoleDiedError, call, end_actor
from pilaf_ray.errors import RoleLostError
from pilaf_ray.heartbeat import Heartbeat
from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.observability.run_status import Pulse, ReplicaStatus
from pilaf_ray.pipeline.departure import Departure
from pilaf_ray.pipeline.supervision import ProgressWatch, Report, SupervisionPolicy, is_late, no_report
from pilaf_ray.pipeline.turns import Turn, own_device
from pilaf_ray.types import (
    LabeledPair,
    RewardScores,
    RewardStepResult,
    RoleUsage,
    ScoredGroup,
    ScoringItem,
    StepResult,
    TokenPair,
)

T = TypeVar("T")
StartGroup = Callable[[], Awaitable[Sequence[Any]]]

OTHER_RANKS_SECONDS = 5.0
"""How long a failed call waits for the other ranks: one of them may know the cause."""


class RankGroup:
    """The ranks of one training job, called together.

    Any rank's loss is the group's: calls raise RoleLostError from then on, until :meth:`rebuild`.

    Args:
        turn: in which calls are sent that need the ranks' devices, where others share those.
    """

    def __init__(
        self,
        role: str,
        actors: Sequence[Any],
        *,
        start: StartGroup,
        call_seconds: float,
        policy: SupervisionPolicy,
        report: Report = no_report,
        turn: Turn = own_device,
    ) -> None:
        self._role = role
        self._actors = list(actors)
        self._start = start
        self._seconds = call_seconds
        self._policy, self._report = policy, report
        self._turn = turn
        self.meter = BusyMeter()
        self._pulses: dict[int, Pulse] = {}
        self._watch_ranks()

    @property
    def replicas(self) -> list[ReplicaStatus]:
        """Each rank and its newest heartbeat; one rank's loss is the group's."""
        serving = self._gone.error is None
        return [
            ReplicaStatus(number=rank, serving=serving, pulse=self._pulses.get(rank))
            for rank in range(len(self._actors))
        ]

    @property
    def loss(self) -> RoleLostError | None:
        """Why the group is of no more use; None while it is."""
        return self._gone.error

    async def unless_lost(self, work: Awaitable[T]) -> T:
        """The result of ``work`` of others that needs this group; raises RoleLostError once the group is lost."""
        return await self._gone.unless_gone(work)

    async def rebuild(self) -> None:
        """End what is left of the group and start another, which has learned nothing so far."""
        await self.close()
        for actor in self._actors:
            await end_actor(actor)
        self._actors = list(await self._start())
        self._watch_ranks()

    async def close(self) -> None:
        """Stop watching the ranks."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """Call ``method`` on every rank at once; results in rank order."""
        async with self._turn():
            with self.meter.call():
                return await self._gone.unless_gone(self._everywhere(method, *arguments))

    async def rest(self) -> None:
        """Free the ranks' devices until :meth:`resume`."""
        await self._gone.unless_gone(self._everywhere("rest"))

    async def resume(self) -> None:
        """Take the devices again, with the same weights and states."""
        await self._gone.unless_gone(self._everywhere("resume"))

    async def _everywhere(self, method: str, *arguments: Any) -> list[Any]:
        calls = [
            asyncio.ensure_future(
                call(
                    getattr(actor, method).remote(*arguments),
                    role=f"{self._role} rank {rank}",
                    seconds=self._seconds,
                    name=method,
                    watch=self._watches[rank],
                )
            )
            for rank, actor in enumerate(self._actors)
        ]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            if any(rank.done() and rank.exception() for rank in calls):
                await asyncio.wait(calls, timeout=OTHER_RANKS_SECONDS)
            errors = [error for rank in calls if rank.done() and (error := rank.exception())]
            if errors:
                # A rank that died makes its peers' collectives fail, never the other way round.
                raise next((error for error in errors if isinstance(error, RoleDiedError)), errors[0])
            return [rank.result() for rank in calls]
        finally:
            for rank in calls:
                rank.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def save(self, folder: Path) -> None:
        """Write every rank's part of a checkpoint."""
        await self.everywhere("save", str(folder))

    async def load(self, folder: Path) -> None:
        """Restore every rank's part of a checkpoint."""
        await self.everywhere("load", str(folder))

    async def usage(self) -> list[RoleUsage]:
        """Busy time and memory of each rank."""
        return list(await self._gone.unless_gone(self._everywhere("usage")))

    def _watch_ranks(self) -> None:
        self._pulses = {}
        self._gone = Departure()
        self._watches = [
            ProgressWatch(f"{self._role} rank {rank}", policy=self._policy, report=self._report)
            for rank in range(len(self._actors))
        ]
        self._watching = [
            asyncio.create_task(self._watch(rank, actor, self._gone)) for rank, actor in enumerate(self._actors)
        ]

    async def _watch(self, rank: int, actor: Any, gone: Departure) -> None:
        name, seconds = f"{self._role} rank {rank}", self._policy.heartbeat_seconds
        while gone.error is None:
            await asyncio.sleep(self._policy.heartbeat_every)
            asked = time.monotonic()
            try:
                beat: Heartbeat = await call(actor.heartbeat.remote(), role=name, seconds=seconds)
                self._pulses[rank] = Pulse(time=time.time(), memory_mib=beat.memory_mib)
                self._watches[rank].heard(beat)
            except RoleLostError as error:
                unread = is_late(time.monotonic() - asked, deadline=seconds) and not isinstance(error, RoleDiedError)
                if not unread:
                    gone.happen(error)


class LearnerGroup(RankGroup):
    """The policy learner."""

    def __init__(self, actors: Sequence[Any], **settings: Any) -> None:
        super().__init__("policy learner", actors, **settings)

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        """One optimiser step on all ranks."""
        # One copy in the object store, however many ranks read it.
        results: list[StepResult] = await self.everywhere("train_step", step, ray.put(list(batch)))
        return results[0]

    async def train_rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> StepResult:
        """One step against the reward model on all ranks."""
        results: list[StepResult] = await self.everywhere("train_rollouts", step, ray.put(list(groups)))
        return results[0]

    async def publish(self, version: int) -> Any:
        """Push ``version``; returns rank 0's WeightUpdate."""
        return (await self.everywhere("publish", version))[0]

    async def publish_again(self, version: int) -> Any:
        """A ticket for the same version through the shared folder, or None where there is no copy of it."""
        remote = self._actors[0].publish_again.remote(version)
        return await self._gone.unless_gone(call(remote, role="policy learner rank 0", seconds=self._seconds))

    async def policy_logprobs(self, items: Sequence[TokenPair]) -> list[list[float]]:
        """Per-token log-probabilities under the learner's current weights."""
        result: list[list[float]] = (await self.everywhere("policy_logprobs", list(items)))[0]
        return result


class RewardGroup(RankGroup):
    """The reward model."""

    def __init__(self, actors: Sequence[Any], **settings: Any) -> None:
        super().__init__("reward model", actors, **settings)

    async def train_step(self, batch: Sequence[LabeledPair]) -> RewardStepResult:
        """One optimiser step on all ranks."""
        results: list[RewardStepResult] = await self.everywhere("train_step", ray.put(list(batch)))
        return results[0]

    async def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        """r̂ of each response; the ranks share the work."""
        results: list[RewardScores] = await self.everywhere("score", ray.put(list(items)))
        return results[0]
