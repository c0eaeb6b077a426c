"""Adapters from Ray actor handles to the ports of the pipeline.

With ``calls.py`` and ``learner_group.py`` the only place with ``.remote()``. Each adapter counts the
time its role is busy, as seen from the controller, gives every call a deadline, and replaces
replicas that are lost (``pipeline/replicas.py``).
"""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_exponential

from pilaf_ray.actors.calls import call, end_actor
from pilaf_ray.errors import OracleUnavailableError, PilafError, RoleLostError
from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.observability.run_status import Pulse, ReplicaStatus
from pilaf_ray.pipeline.replicas import ReplicaPool
from pilaf_ray.pipeline.supervision import Report, SupervisionPolicy, no_report
from pilaf_ray.pipeline.turns import Turn, own_device
from pilaf_ray.store.records import LedgerCounts, UnfinishedWork
from pilaf_ray.types import (
    GenerationRequest,
    LabeledPair,
    PairPlan,
    PreferenceLabel,
    ReferenceLogprobs,
    ResponsePair,
    RoleUsage,
    SampledResponse,
    TokenPair,
)

Spawn = Callable[[int], Awaitable[Any]]
"""``await spawn(n)`` starts replica number n and returns its handle once it is ready."""
PullWeights = Callable[[Any, int, Any], Awaitable[None]]
"""``await pull(actor, number, update)`` returns once that generator serves the update."""


class _Replicas:
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
        self._pool: ReplicaPool[Any] = ReplicaPool(
            role, actors, replace=spawn, end=end_actor, ping=self._ping, policy=policy, report=report
        )

    async def _ping(self, actor: Any) -> None:
        # The pool has its own, shorter patience.
        memory = await call(actor.heartbeat.remote(), role=self._role, seconds=self._seconds)
        self._pulses[actor] = Pulse(time=time.time(), memory_mib=memory)

    @property
    def replicas(self) -> list[ReplicaStatus]:
        """Each replica and its newest heartbeat."""
        living = self._pool.living()
        self._pulses = {actor: pulse for actor, pulse in self._pulses.items() if actor in living.values()}
        return [
            ReplicaStatus(number=number, serving=number in living, pulse=self._pulses.get(living.get(number)))
            for number in self._pool.numbers
        ]

    async def ask(self, method: str, *arguments: Any, pairs: Sequence[str] = ()) -> Any:
        """Call ``method`` on the least loaded replica; ``pairs`` are the ids of the pairs it is about."""

        async def work(actor: Any, replica: int) -> Any:
            remote = getattr(actor, method).remote(*arguments)
            return await call(remote, role=f"{self._role}-{replica}", seconds=self._seconds, name=method)

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


class GeneratorPool(_Replicas):
    """Generator replicas behind one face; a newcomer pulls the newest weights before it samples.

    Args:
        turn: in which requests are sent, where the learner shares the generators' devices.
        joining: in which a newcomer starts, which requests may wait for.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        *,
        spawn: Spawn,
        leave: Callable[[int], None] = lambda _number: None,
        turn: Turn = own_device,
        joining: Turn = own_device,
        **settings: Any,
    ) -> None:
        self._spawn, self._leave = spawn, leave
        self._turn, self._joining = turn, joining
        self._attempts = count()
        self._newest: tuple[PullWeights, Any] | None = None
        self._nodes: dict[Any, str] = {}
        super().__init__("generator", actors, spawn=self._newcomer, **settings)

    @property
    def actors(self) -> dict[int, Any]:
        """The replicas that sample now, by number."""
        return self._pool.living()

    def lose(self, number: int, error: RoleLostError) -> None:
        """Replace a generator that nobody can update."""
        self._pool.lose(number, error)

    async def unless_lost(self, number: int, work: Awaitable[None]) -> None:
        """Await ``work`` of generator ``number``; raises RoleLostError once that generator is given up."""
        await self._pool.unless_lost(number, work)

    def follow(self, pull: PullWeights, update: Any) -> None:
        """From now on newcomers serve ``update``; the caller sees to those that sample already."""
        self._newest = (pull, update)

    def forget_weights(self) -> None:
        """The newest update is worthless: its publisher is gone."""
        self._newest = None

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        """Sample one response, on whichever replica lives to finish it."""
        # An engine refuses a name that is still under way, as an earlier attempt may be.
        named = dataclasses.replace(request, request_id=f"{request.request_id}.{next(self._attempts)}")
        async with self._turn():
            response: SampledResponse = await self.ask("generate", named, pairs=[request.pair_id])
        return response

    async def rest(self) -> None:
        """Free the devices; requests that nobody waits for are dropped."""
        await self._everywhere("rest")

    async def resume(self) -> None:
        """Take the devices again, with the weights that were served before."""
        await self._everywhere("resume")

    async def _everywhere(self, method: str) -> None:
        """Call ``method`` on each replica; one that does not answer is replaced."""

        async def one(number: int, actor: Any) -> None:
            work = call(getattr(actor, method).remote(), role=f"generator-{number}", seconds=self._seconds)
            try:
                await self.unless_lost(number, work)
            except RoleLostError as error:
                if self.actors.get(number) is actor:
                    self.lose(number, error)

        await asyncio.gather(*(one(number, actor) for number, actor in self.actors.items()))

    async def _newcomer(self, number: int) -> Any:
        async with self._joining():
            return await self._started(number)

    async def _started(self, number: int) -> Any:
        actor = await self._spawn(number)
        served: object = None
        try:
            while self._newest is not None and self._newest is not served:
                served = self._newest
                pull, update = self._newest
                try:
                    await pull(actor, number, update)
                except PilafError:
                    # Of a learner that was lost meanwhile; what is newest now, if anything is, decides.
                    if self._newest is served:
                        raise
        except BaseException:
            await end_actor(actor)
            raise
        return actor

    async def resize(self, replicas: int) -> int:
        """Start or end generators until there are ``replicas``; returns how many there are.

        One that does not start is reported and done without.
        """
        await self.add([None] * (replicas - len(self._pool)))
        while replicas < len(self._pool):
            await self.remove()
        return len(self._pool)

    async def add(self, numbers: Sequence[int | None]) -> None:
        """Start a generator for each number (None: the lowest that is free); one that does not start is reported."""
        growing = [self._pool.grow(number) for number in numbers]
        for found in await asyncio.gather(*growing, return_exceptions=True):
            if isinstance(found, PilafError):
                self._report("generator not added", cause=str(found))
            elif isinstance(found, BaseException):
                raise found

    async def remove(self, number: int | None = None) -> None:
        """End one generator, the last when left out; it hands its work back first, and its own reservation."""
        self._leave(await self._pool.shrink(number))

    @property
    def lost(self) -> frozenset[int]:
        """Generators that were lost and are being replaced."""
        return self._pool.lost

    @property
    def numbers(self) -> list[int]:
        """All generators, those that are being replaced included."""
        return self._pool.numbers

    async def nodes(self) -> dict[int, str | None]:
        """Ray's id of the node of each generator, by number; None while it is being replaced."""
        living = self._pool.living()
        for number, actor in living.items():
            if actor not in self._nodes:
                asked = call(actor.node.remote(), role=f"generator-{number}", seconds=self._seconds)
                self._nodes[actor] = await asked
        self._nodes = {actor: node for actor, node in self._nodes.items() if actor in living.values()}
        return {number: self._nodes.get(living.get(number)) for number in self._pool.numbers}

    async def stop(self) -> None:
        """End the replicas and give their memory back."""
        await self.close()
        for number, actor in self.actors.items():
            await call(actor.stop.remote(), role=f"generator-{number}", seconds=self._seconds)
            await end_actor(actor)


class ReferencePool(_Replicas):
    """The reference model's replicas."""

    def __init__(self, actors: Sequence[Any], **settings: Any) -> None:
        super().__init__("reference", actors, **settings)

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        """log π_ref of both sides of each pair."""
        result: list[ReferenceLogprobs] = await self.ask("score", list(pairs), pairs=_ids(pairs))
        return result

    async def score_responses(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[float]:
        """log π_ref of single (prompt, response) token pairs, which ``pairs`` are about."""
        result: list[float] = await self.ask("score_responses", list(items), pairs=pairs)
        return result

    async def score_tokens(self, items: Sequence[TokenPair], *, pairs: Sequence[str] = ()) -> list[list[float]]:
        """log π_ref of each response token of single (prompt, response) token pairs, which ``pairs`` are about."""
        result: list[list[float]] = await self.ask("score_tokens", list(items), pairs=pairs)
        return result


class OraclePool(_Replicas):
    """The preference oracle's replicas; an outage is waited for."""

    def __init__(self, actors: Sequence[Any], *, outage_seconds: float, name: str = "oracle", **settings: Any) -> None:
        super().__init__(name, actors, **settings)
        self._outage_seconds = outage_seconds

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair; raises OracleUnavailableError after an outage of ``outage_seconds``."""
        result: list[PreferenceLabel] = await self._patiently("label", list(pairs), pairs=_ids(pairs))
        return result

    async def score_texts(self, prompts: list[str], responses: list[str], *, pairs: Sequence[str] = ()) -> list[float]:
        """The oracle's own reward of single responses: candidates of ``pairs``, or an evaluation's."""
        result: list[float] = await self._patiently("score_texts", prompts, responses, pairs=pairs)
        return result

    async def _patiently(self, method: str, *arguments: Any, pairs: Sequence[str] = ()) -> Any:
        def note(state: RetryCallState) -> None:
            assert state.outcome is not None
            self._report("oracle outage", attempt=state.attempt_number, cause=str(state.outcome.exception()))

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(OracleUnavailableError),
            stop=stop_after_delay(self._outage_seconds),
            wait=wait_exponential(multiplier=self._policy.first_pause, max=self._policy.longest_pause),
            before_sleep=note,
            reraise=True,
        )
        return await retrying(self.ask, method, *arguments, pairs=pairs)


class StoreHandle(_Replicas):
    """The ledger's single writer; replaced on its file, its arrows may be repeated.

    Args:
        name: Ray's name of the actor, and of each that replaces it.
    """

    def __init__(self, actor: Any, *, name: str, spawn: Spawn, **settings: Any) -> None:
        self.name = name
        self._spawn = spawn
        self._desk: tuple[float, str] | None = None
        super().__init__("preference store", [actor], spawn=self._newcomer, **settings)

    async def _newcomer(self, number: int) -> Any:
        """A new writer lets people label where the old one did."""
        actor = await self._spawn(number)
        if self._desk is not None:
            await call(actor.open_desk.remote(*self._desk), role=self._role, seconds=self._seconds)
        return actor

    async def add_plans(self, plans: Sequence[PairPlan]) -> None:
        await self.ask("add_plans", list(plans))

    async def add_responses(self, pairs: Sequence[ResponsePair]) -> None:
        await self.ask("add_responses", list(pairs))

    async def add_labels(self, labels: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        await self.ask("add_labels", list(labels), list(references))

    async def reject(self, pair_id: str, reason: str) -> None:
        await self.ask("reject", pair_id, reason)

    async def mark_trained(self, step: int, pair_ids: Sequence[str]) -> None:
        await self.ask("mark_trained", step, list(pair_ids))

    async def reset_after(self, version: int) -> int:
        """Undo everything that needs weights newer than ``version``."""
        count: int = await self.ask("reset_after", version)
        return count

    async def counts(self) -> LedgerCounts:
        counts: LedgerCounts = await self.ask("counts")
        return counts

    async def unfinished(self) -> UnfinishedWork:
        work: UnfinishedWork = await self.ask("unfinished")
        return work

    async def record_reward_uses(self, step: int, pair_ids: Sequence[str]) -> None:
        """What the reward model was trained on at ``step``."""
        await self.ask("record_reward_uses", step, list(pair_ids))

    async def reward_window(self, window_pairs: int, held_out: float) -> list[tuple[LabeledPair, int]]:
        """The newest pairs for the reward model's replay, with their uses."""
        window: list[tuple[LabeledPair, int]] = await self.ask("reward_window", window_pairs, held_out)
        return window

    async def compact(self, through_step: int, window_pairs: int, held_out: float) -> int:
        """Drop answers that nothing needs; returns of how many pairs."""
        dropped: int = await self.ask("compact", through_step, window_pairs, held_out)
        return dropped

    async def open_desk(self, lease_seconds: float, inbox: Path) -> None:
        """Let people label; imported votes arrive in ``inbox``."""
        self._desk = (lease_seconds, str(inbox.resolve()))
        await self.ask("open_desk", *self._desk)

    async def desk(self, method: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Call a method of the labelling desk, which may be asked twice."""
        return await self.ask("desk", method, arguments, named)

    async def next_plan_index(self) -> int:
        """The index that the next new plan gets."""
        index: int = await self.ask("next_plan_index")
        return index


def _ids(pairs: Sequence[ResponsePair]) -> list[str]:
    return [pair.plan.pair_id for pair in pairs]
