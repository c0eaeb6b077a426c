"""Adapters from Ray actor handles to the ports of the pipeline.

The only place with ``.remote()``. Each adapter counts the time its role is busy,
as seen from the controller, and gives every call a deadline.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from pilaf_ray.errors import PilafError
from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.store.records import LedgerCounts
from pilaf_ray.types import (
    GenerationRequest,
    LabeledPair,
    PairPlan,
    PreferenceLabel,
    ReferenceLogprobs,
    ResponsePair,
    RewardScores,
    RewardStepResult,
    RoleUsage,
    SampledResponse,
    ScoredGroup,
    ScoringItem,
    StepResult,
)

T = TypeVar("T")
TokenPair = tuple[tuple[int, ...], tuple[int, ...]]


class ActorCallError(PilafError, RuntimeError):
    """A remote call failed for a reason that is not one of our own errors."""


async def call(reference: Awaitable[T], *, role: str, seconds: float) -> T:
    """Await a remote result; our own errors arrive as themselves, without Ray's wrapping."""
    try:
        async with asyncio.timeout(seconds):
            return await reference
    except TimeoutError as error:
        raise ActorCallError(f"{role} did not answer within {seconds:.0f} s; see its log") from error
    except RayTaskError as error:
        if isinstance(error.cause, PilafError):
            raise error.cause from None
        raise
    except RayActorError as error:
        # Ray's text ends with the cause: the last line of a traceback, or how the process ended.
        cause = str(error).strip().splitlines()[-1].strip()
        raise ActorCallError(f"{role} has died ({cause}); see its log, then continue with --resume") from error


class GeneratorPool:
    """Generator replicas behind one face: each request goes to the least loaded replica."""

    def __init__(self, actors: Sequence[Any], *, call_seconds: float) -> None:
        self._actors = list(actors)
        self._seconds = call_seconds
        self._load = [0] * len(self._actors)
        self.meter = BusyMeter()

    @property
    def actors(self) -> list[Any]:
        """The actor handles, replica by replica."""
        return self._actors

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        replica = min(range(len(self._actors)), key=self._load.__getitem__)
        self._load[replica] += 1
        try:
            with self.meter.call():
                actor = self._actors[replica]
                return await call(actor.generate.remote(request), role=f"generator-{replica}", seconds=self._seconds)
        finally:
            self._load[replica] -= 1

    async def usage(self) -> list[RoleUsage]:
        return list(await asyncio.gather(*(actor.usage.remote() for actor in self._actors)))

    async def stop(self) -> None:
        """End the replicas and give their memory back."""
        for number, actor in enumerate(self._actors):
            await call(actor.stop.remote(), role=f"generator-{number}", seconds=self._seconds)
            ray.kill(actor)


class _Replicas:
    """Stateless replicas that take turns; the shared part of reference and oracle."""

    def __init__(self, role: str, actors: Sequence[Any], *, call_seconds: float) -> None:
        self._role = role
        self._actors = list(actors)
        self._seconds = call_seconds
        self._turn = 0
        self.meter = BusyMeter()

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Call ``method`` on the replica whose turn it is."""
        replica = self._turn % len(self._actors)
        self._turn += 1
        remote = getattr(self._actors[replica], method).remote(*arguments)
        with self.meter.call():
            return await call(remote, role=f"{self._role}-{replica}", seconds=self._seconds)

    async def usage(self) -> list[RoleUsage]:
        """Busy time and memory of each replica."""
        return list(await asyncio.gather(*(actor.usage.remote() for actor in self._actors)))


class ReferencePool(_Replicas):
    """The reference model's replicas."""

    def __init__(self, actors: Sequence[Any], *, call_seconds: float) -> None:
        super().__init__("reference", actors, call_seconds=call_seconds)

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        """log π_ref of both sides of each pair."""
        result: list[ReferenceLogprobs] = await self.ask("score", list(pairs))
        return result

    async def score_responses(self, items: Sequence[TokenPair]) -> list[float]:
        """log π_ref of single (prompt, response) token pairs."""
        result: list[float] = await self.ask("score_responses", list(items))
        return result

    async def score_tokens(self, items: Sequence[TokenPair]) -> list[list[float]]:
        """log π_ref of each response token of single (prompt, response) token pairs."""
        result: list[list[float]] = await self.ask("score_tokens", list(items))
        return result


class OraclePool(_Replicas):
    """The preference oracle's replicas."""

    def __init__(self, actors: Sequence[Any], *, call_seconds: float) -> None:
        super().__init__("oracle", actors, call_seconds=call_seconds)

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair."""
        result: list[PreferenceLabel] = await self.ask("label", list(pairs))
        return result

    async def score_texts(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The oracle's own reward of single responses, for evaluation."""
        result: list[float] = await self.ask("score_texts", prompts, responses)
        return result


class RankGroup:
    """The ranks of one training job, called together."""

    def __init__(self, role: str, actors: Sequence[Any], *, call_seconds: float) -> None:
        self._role = role
        self._actors = list(actors)
        self._seconds = call_seconds
        self.meter = BusyMeter()

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """Call ``method`` on every rank at once; results in rank order."""
        with self.meter.call():
            return list(
                await asyncio.gather(
                    *(
                        call(
                            getattr(actor, method).remote(*arguments),
                            role=f"{self._role} rank {rank}",
                            seconds=self._seconds,
                        )
                        for rank, actor in enumerate(self._actors)
                    )
                )
            )

    async def save(self, folder: Path) -> None:
        """Write every rank's part of a checkpoint."""
        await self.everywhere("save", str(folder))

    async def load(self, folder: Path) -> None:
        """Restore every rank's part of a checkpoint."""
        await self.everywhere("load", str(folder))

    async def usage(self) -> list[RoleUsage]:
        """Busy time and memory of each rank."""
        return list(await asyncio.gather(*(actor.usage.remote() for actor in self._actors)))


class LearnerGroup(RankGroup):
    """The policy learner."""

    def __init__(self, actors: Sequence[Any], *, call_seconds: float) -> None:
        super().__init__("policy learner", actors, call_seconds=call_seconds)

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

    async def policy_logprobs(self, items: Sequence[TokenPair]) -> list[list[float]]:
        """Per-token log-probabilities under the learner's current weights."""
        result: list[list[float]] = (await self.everywhere("policy_logprobs", list(items)))[0]
        return result


class RewardGroup(RankGroup):
    """The reward model."""

    def __init__(self, actors: Sequence[Any], *, call_seconds: float) -> None:
        super().__init__("reward model", actors, call_seconds=call_seconds)

    async def train_step(self, batch: Sequence[LabeledPair]) -> RewardStepResult:
        """One optimiser step on all ranks."""
        results: list[RewardStepResult] = await self.everywhere("train_step", ray.put(list(batch)))
        return results[0]

    async def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        """r̂ of each response; the ranks share the work."""
        results: list[RewardScores] = await self.everywhere("score", ray.put(list(items)))
        return results[0]


class StoreHandle:
    """The ledger's single writer."""

    def __init__(self, actor: Any, *, call_seconds: float) -> None:
        self._actor = actor
        self._seconds = call_seconds

    async def _ask(self, method: str, *arguments: Any) -> Any:
        remote = getattr(self._actor, method).remote(*arguments)
        return await call(remote, role="preference store", seconds=self._seconds)

    async def add_plans(self, plans: Sequence[PairPlan]) -> None:
        await self._ask("add_plans", list(plans))

    async def add_responses(self, pairs: Sequence[ResponsePair]) -> None:
        await self._ask("add_responses", list(pairs))

    async def add_labels(self, labels: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        await self._ask("add_labels", list(labels), list(references))

    async def reject(self, pair_id: str, reason: str) -> None:
        await self._ask("reject", pair_id, reason)

    async def mark_trained(self, step: int, pair_ids: Sequence[str]) -> None:
        await self._ask("mark_trained", step, list(pair_ids))

    async def roll_back(self, step: int) -> int:
        count: int = await self._ask("roll_back", step)
        return count

    async def reset_after(self, version: int) -> int:
        """Undo everything that needs weights newer than ``version``."""
        count: int = await self._ask("reset_after", version)
        return count

    async def counts(self) -> LedgerCounts:
        counts: LedgerCounts = await self._ask("counts")
        return counts

    async def unfinished(self) -> tuple[list[PairPlan], list[ResponsePair], list[LabeledPair]]:
        work: tuple[list[PairPlan], list[ResponsePair], list[LabeledPair]] = await self._ask("unfinished")
        return work

    async def record_reward_uses(self, step: int, pair_ids: Sequence[str]) -> None:
        """What the reward model was trained on at ``step``."""
        await self._ask("record_reward_uses", step, list(pair_ids))

    async def reward_window(self, window_pairs: int, held_out: float) -> list[tuple[LabeledPair, int]]:
        """The newest pairs for the reward model's replay, with their uses."""
        window: list[tuple[LabeledPair, int]] = await self._ask("reward_window", window_pairs, held_out)
        return window

    async def open_desk(self, lease_seconds: float, inbox: Path) -> None:
        """Let people label; imported votes arrive in ``inbox``."""
        await self._ask("open_desk", lease_seconds, str(inbox.resolve()))

    @property
    def actor(self) -> Any:
        """The actor itself, for the labelling desk in front of it."""
        return self._actor

    async def next_plan_index(self) -> int:
        """The index that the next new plan gets."""
        index: int = await self._ask("next_plan_index")
        return index
