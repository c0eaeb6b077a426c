"""Adapters of reference, oracle and store from Ray actor handles to the ports of the pipeline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_exponential

from pilaf_ray.actors.calls import call
from pilaf_ray.actors.replica_handles import ReplicaHandles, Spawn
from pilaf_ray.errors import OracleUnavailableError
from pilaf_ray.store.records import LedgerCounts, UnfinishedWork
from pilaf_ray.types import (
    LabeledPair,
    PairPlan,
    PreferenceLabel,
    ReferenceLogprobs,
    ResponsePair,
    TokenPair,
)


class ReferencePool(ReplicaHandles):
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


class OraclePool(ReplicaHandles):
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


class StoreHandle(ReplicaHandles):
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
