"""The Ray actors: one thin wrapper a role, each body a delegation to a plain class.

The plain classes import torch, vLLM or DeepSpeed, so they are imported inside the
actors: the driver process stays light and can run on a login node.

``heartbeat`` answers beside the work, in the concurrency group ``watch``, so that a busy role is
not taken for a dead one; it says how much memory is in use, and whether the role gets on with its work, where that is
counted (``PROGRESS.work``). The generator's goes through its engine, which is a process of its own.

Models of URLs become folders of the actor's node here (:func:`pilaf_ray.engines.model_store.local_models`), before
the plain class is made: its engine's workers, and all other roles of the node, read those.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from pilaf_ray.engines.model_store import local_models
from pilaf_ray.heartbeat import Heartbeat
from pilaf_ray.observability.logs import setup_logging
from pilaf_ray.observability.progress import PROGRESS
from pilaf_ray.observability.usage import resident_mib
from pilaf_ray.store.records import LedgerCounts, UnfinishedWork
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
    TokenPair,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pilaf_ray.engines.weight_tickets import WeightUpdate


class _Generator:
    """Wraps :class:`pilaf_ray.engines.generator.Generator`; an asyncio actor."""

    def __init__(self, name: str, logs: str, arguments: dict[str, Any]) -> None:
        setup_logging(name, Path(logs))
        from pilaf_ray.engines.generator import Generator
        from pilaf_ray.engines.rendezvous import listen_at

        # Its engine's processes meet the learner for new weights.
        listen_at(ray.util.get_node_ip_address())
        self._generator = Generator(**local_models(arguments))
        self._updates = 0

    async def start(self) -> None:
        from pilaf_ray.engines.engine_processes import EngineProcesses

        await self._generator.start()
        self._processes = EngineProcesses()

    async def heartbeat(self) -> Heartbeat:
        # An engine that takes new weights answers nothing else; slowness there is for the update's own deadline.
        await (self._processes.alive() if self._updates else self._generator.heartbeat())
        return PROGRESS.beat(resident_mib())

    async def node(self) -> str:
        """Ray's id of the node that it runs on."""
        node: str = ray.get_runtime_context().get_node_id()
        return node

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        with PROGRESS.work("generate"):
            return await self._generator.generate(request)

    async def update_weights(self, update: "WeightUpdate", deadline_seconds: float) -> None:
        # Whoever asked may go away, e.g. because the learner has died: an update that was cut off in its middle would
        # leave the engine paused for ever. It ends by itself, and the next one waits for it.
        task = asyncio.ensure_future(self._update(update, deadline_seconds))
        self._updates += 1
        task.add_done_callback(self._updated)
        await asyncio.shield(task)

    async def _update(self, update: "WeightUpdate", deadline_seconds: float) -> None:
        with PROGRESS.excused():
            await self._generator.update_weights(update, deadline_seconds=deadline_seconds)

    def _updated(self, task: "asyncio.Task[None]") -> None:
        self._updates -= 1
        if not task.cancelled() and task.exception() is not None:
            logging.getLogger(__name__).warning("weights were not updated: %s", task.exception())

    async def rest(self) -> None:
        await self._generator.rest()

    async def resume(self) -> None:
        await self._generator.resume()

    async def score(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> list[float]:
        with PROGRESS.work("score"):
            logprobs: list[float] = await self._generator.score(prompt, response)
            return logprobs

    async def usage(self) -> RoleUsage:
        return self._generator.usage()

    async def stop(self) -> None:
        await self._generator.stop()


class _Reference:
    """Wraps :class:`pilaf_ray.engines.reference.ReferenceModel`."""

    def __init__(self, name: str, logs: str, arguments: dict[str, Any]) -> None:
        setup_logging(name, Path(logs))
        from pilaf_ray.engines.reference import ReferenceModel

        self._reference = ReferenceModel(**local_models(arguments))

    def start(self) -> None:
        """Answers once the model is loaded."""

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def heartbeat(self) -> Heartbeat:
        """Answers while the process lives."""
        return PROGRESS.beat(resident_mib())

    def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        with PROGRESS.work("score"):
            return self._reference.score(pairs)

    def score_responses(self, items: Sequence[TokenPair]) -> list[float]:
        with PROGRESS.work("score_responses"):
            return self._reference.score_responses(items)

    def score_tokens(self, items: Sequence[TokenPair]) -> list[list[float]]:
        with PROGRESS.work("score_tokens"):
            return self._reference.score_tokens(items)

    def usage(self) -> RoleUsage:
        return self._reference.usage()


class _Oracle:
    """Wraps any preference oracle of :mod:`pilaf_ray.oracle`."""

    def __init__(self, name: str, logs: str, kind: str, arguments: dict[str, Any]) -> None:
        setup_logging(name, Path(logs))
        from pilaf_ray.oracle import make_oracle

        self._oracle = make_oracle(kind, local_models(arguments))

    async def start(self) -> None:
        """Answers once the oracle is loaded."""

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    async def heartbeat(self) -> Heartbeat:
        """Answers while the process lives."""
        return PROGRESS.beat(resident_mib())

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        with PROGRESS.work("label"):
            return await self._oracle.label(pairs)

    async def score_texts(self, prompts: list[str], responses: list[str]) -> list[float]:
        with PROGRESS.work("score_texts"):
            return await self._oracle.score_texts(prompts, responses)

    async def usage(self) -> RoleUsage:
        return self._oracle.usage()


class _Rank:
    """A rank of a training job, before it has joined the others."""

    def __init__(self, name: str, logs: str, rank: int) -> None:
        setup_logging(name, Path(logs))
        from pilaf_ray.engines.rendezvous import listen_at

        listen_at(ray.util.get_node_ip_address())
        self._rank = rank

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port of this rank's node, for rank 0 of a new group."""
        from pilaf_ray.engines.rendezvous import free_address

        return free_address(ray.util.get_node_ip_address())

    def fetch(self, arguments: dict[str, Any]) -> None:
        """Answers once the models that ``arguments`` name by URL are on this node."""
        local_models(arguments)

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def heartbeat(self) -> Heartbeat:
        """Answers while the process lives."""
        return PROGRESS.beat(resident_mib())


class _Reward(_Rank):
    """Wraps one rank of :class:`pilaf_ray.engines.reward_learner.RewardLearner`."""

    def start(self, arguments: dict[str, Any]) -> None:
        from pilaf_ray.engines.reward_learner import RewardLearner

        self._learner = RewardLearner(rank=self._rank, **local_models(arguments))

    def train_step(self, batch: Sequence[LabeledPair]) -> RewardStepResult:
        with PROGRESS.work("train_step"):
            return self._learner.train_step(batch)

    def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        with PROGRESS.work("score"):
            return self._learner.score(items)

    def save(self, folder: str) -> None:
        self._learner.save(Path(folder))

    def load(self, folder: str) -> None:
        self._learner.load(Path(folder))

    def usage(self) -> RoleUsage:
        return self._learner.usage()


class _Learner(_Rank):
    """Wraps one rank of :class:`pilaf_ray.engines.learner.PolicyLearner`."""

    def start(self, arguments: dict[str, Any], publisher: dict[str, Any]) -> None:
        from pilaf_ray.engines.learner import PolicyLearner
        from pilaf_ray.engines.rollout_learner import RolloutLearner
        from pilaf_ray.engines.weight_publishers import make_publisher

        # Only one that optimises against a reward model makes advantages.
        kind: Any = RolloutLearner if "advantages" in arguments else PolicyLearner
        self._learner = kind(rank=self._rank, **local_models(arguments))
        host = ray.util.get_node_ip_address()
        self._publisher = make_publisher(host=host, **publisher) if self._rank == 0 else None

    def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        with PROGRESS.work("train_step"):
            return self._learner.train_step(step, batch)

    def train_rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> StepResult:
        with PROGRESS.work("train_rollouts"):
            return self._learner.train_rollouts(step, groups)

    def publish(self, version: int) -> "WeightUpdate | None":
        """Push; every rank walks the parameters in lockstep, rank 0 alone sends them."""
        weights: Iterator[tuple[str, Tensor]] = self._learner.sent_weights()
        if self._publisher is None:
            for _ in weights:
                pass
            return None
        return self._publisher.publish(version, weights, adapter_scale=self._learner.adapter_scale)

    @ray.method(concurrency_group="beside")  # type: ignore[untyped-decorator]
    def publish_again(self, version: int) -> "WeightUpdate | None":
        """A ticket for the shared folder; beside the next step, for the copy is not the learner's weights."""
        return None if self._publisher is None else self._publisher.publish_again(version)

    def rest(self) -> None:
        self._learner.rest()

    def resume(self) -> None:
        self._learner.resume()

    def policy_logprobs(self, items: Sequence[TokenPair]) -> list[list[float]]:
        with PROGRESS.work("policy_logprobs"):
            logprobs: list[list[float]] = self._learner.policy_logprobs(items)
            return logprobs

    def save(self, folder: str) -> None:
        self._learner.save(Path(folder))

    def load(self, folder: str) -> None:
        self._learner.load(Path(folder))

    def usage(self) -> RoleUsage:
        return self._learner.usage()


class _Store:
    """Wraps :class:`pilaf_ray.store.ledger.PreferenceLedger`, the single writer of the ledger."""

    def __init__(self, name: str, logs: str, url: str, namespace: str | None) -> None:
        setup_logging(name, Path(logs))
        from pilaf_ray.store.ledger import PreferenceLedger

        self._ledger = PreferenceLedger(url, namespace=namespace)

    def start(self) -> None:
        """Answers once the ledger is open."""

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def heartbeat(self) -> Heartbeat:
        """Answers while the process lives."""
        return PROGRESS.beat(resident_mib())

    def add_plans(self, plans: Sequence[PairPlan]) -> None:
        self._ledger.add_plans(plans)

    def add_responses(self, pairs: Sequence[ResponsePair]) -> None:
        self._ledger.add_responses(pairs)

    def add_labels(self, labels: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        self._ledger.add_labels(labels, references)

    def reject(self, pair_id: str, reason: str) -> None:
        self._ledger.reject(pair_id, reason)

    def mark_trained(self, step: int, pair_ids: Sequence[str]) -> None:
        self._ledger.mark_trained(step, pair_ids)

    def reset_after(self, version: int) -> int:
        return self._ledger.reset_after(version)

    def counts(self) -> LedgerCounts:
        return self._ledger.counts()

    def unfinished(self) -> UnfinishedWork:
        return self._ledger.unfinished()

    def record_reward_uses(self, step: int, pair_ids: Sequence[str]) -> None:
        self._ledger.record_reward_uses(step, pair_ids)

    def reward_window(self, window_pairs: int, held_out: float) -> list[tuple[LabeledPair, int]]:
        return self._ledger.reward_window(window_pairs, held_out)

    def compact(self, through_step: int, window_pairs: int, held_out: float) -> int:
        return self._ledger.compact(through_step, window_pairs, held_out)

    def next_plan_index(self) -> int:
        return self._ledger.next_plan_index()

    def open_desk(self, lease_seconds: float, inbox: str) -> None:
        """Let people label; :mod:`pilaf_ray.actors.people` asks."""
        from pilaf_ray.store.desk import LabelDesk

        self._desk = LabelDesk(self._ledger, lease_seconds=lease_seconds, inbox=Path(inbox))

    def desk(self, method: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        return getattr(self._desk, method)(*arguments, **named)


GeneratorActor = ray.remote(_Generator)
_watched = ray.remote(concurrency_groups={"watch": 1})
ReferenceActor = _watched(_Reference)
OracleActor = _watched(_Oracle)
RewardActor = _watched(_Reward)
# A large model's second way takes longer than a heartbeat may.
LearnerActor = ray.remote(concurrency_groups={"watch": 1, "beside": 1})(_Learner)
StoreActor = _watched(_Store)
