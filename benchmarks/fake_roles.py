"""Roles without models for `benchmarks.control_plane`: they answer at once, or after a given time.

Around them stand the parts that a run has: replica pools, the reuse of log π_ref, the weight-sync order, the ledger.
Ray is not there: what it costs to send a message comes on top.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from cProfile import Profile
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.arithmetic import Latencies
from benchmarks.ledger import make_pair
from pilaf_ray.pipeline.replicas import ReplicaPool
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.records import LedgerCounts
from pilaf_ray.types import (
    GenerationRequest,
    LabeledPair,
    PairPlan,
    PreferenceLabel,
    ReferenceLogprobs,
    ResponsePair,
    RoleUsage,
    SampledResponse,
    StepResult,
    VersionSpan,
)

T = TypeVar("T")
TokenPair = tuple[tuple[int, ...], tuple[int, ...]]

_TEMPLATES = 64
"""Different responses; who reads a response does the same work whichever it is."""


class Responses:
    """Ready-made responses, so that making them up is no part of what is measured."""

    def __init__(self, *, tokens: int) -> None:
        draw = random.Random(0)
        self._made = [make_pair(index, tokens=tokens, draw=draw).a for index in range(_TEMPLATES)]
        self._tokens = tokens
        self._known: dict[tuple[int, float, int], SampledResponse] = {}

    def get(self, request: GenerationRequest, version: int) -> SampledResponse:
        """A response under ``version``; plain ones know one distribution only, as the generator's."""
        key = (request.seed % _TEMPLATES, request.coefficient, version)
        found = self._known.get(key)
        if found is None:
            span = VersionSpan(version=version, start=0, end=self._tokens)
            found = replace(self._made[key[0]], coefficient=request.coefficient, versions=(span,))
            if not request.coefficient:
                found = replace(found, policy_logprobs=None, reference_logprobs=None)
            self._known[key] = found
        return found

    def forget_before(self, version: int) -> None:
        """Nobody samples under older versions any more."""
        self._known = {key: made for key, made in self._known.items() if key[2] >= version}


class FakeEngine:
    """One generator: ``slots`` responses at a time, none while it takes weights."""

    def __init__(self, responses: Responses, *, slots: int, latencies: Latencies, length_spread: float) -> None:
        self._responses = responses
        self._slots = asyncio.Semaphore(slots)
        self._latencies = latencies
        self._length_spread = length_spread
        self._paused = 0.0
        self.version = 0

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        async with self._slots:
            version = self.version
            if self._latencies.response:
                # Uniform around the mean, by the request's own seed.
                share = 1.0 + self._length_spread * (2.0 * (request.seed % 1009) / 1008 - 1.0)
                await self._work(share * self._latencies.response)
            return self._responses.get(request, version)

    async def update_weights(self, version: int) -> None:
        if self._latencies.pull:
            self._paused += self._latencies.pull
            await asyncio.sleep(self._latencies.pull)
        self.version = version
        self._responses.forget_before(version - 1)

    async def _work(self, seconds: float) -> None:
        """Sleep, and as long again as the engine stood still meanwhile."""
        while seconds > 0:
            before = self._paused
            await asyncio.sleep(seconds)
            seconds = self._paused - before


class FakeGenerators:
    """All generators behind the pool that spreads requests in a run."""

    def __init__(self, engines: Sequence[FakeEngine]) -> None:
        self.engines = engines
        self._pool = _pool("generator", engines)

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        async def work(engine: FakeEngine, _: int) -> SampledResponse:
            return await engine.generate(request)

        return await self._pool.run(work, pairs=[request.request_id.rpartition("-")[0]])

    async def usage(self) -> list[RoleUsage]:
        return []


class _Serial:
    """One replica that works on one call at a time, each pair for the same time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._busy = asyncio.Lock()

    async def work(self, pairs: float) -> None:
        if self._seconds:
            async with self._busy:
                await asyncio.sleep(self._seconds * pairs)


class FakeOracle:
    """Prefers a or b by the pair's own seed."""

    def __init__(self, *, replicas: int, seconds: float) -> None:
        self._pool = _pool("oracle", [_Serial(seconds) for _ in range(replicas)])

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        async def work(replica: _Serial, _: int) -> None:
            await replica.work(len(pairs))

        await self._pool.run(work, pairs=_ids(pairs))
        return [
            PreferenceLabel(
                pair_id=pair.plan.pair_id,
                probability=float(pair.plan.label_seed % 2),
                source="function",
                reward_a=0.3,
                reward_b=0.1,
            )
            for pair in pairs
        ]

    async def usage(self) -> list[RoleUsage]:
        return []


class FakeReference:
    """Says the same of every response."""

    def __init__(self, *, replicas: int, seconds: float) -> None:
        self._pool = _pool("reference", [_Serial(seconds) for _ in range(replicas)])

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        await self._work(len(pairs), _ids(pairs))
        return [ReferenceLogprobs(pair_id=pair.plan.pair_id, a=-80.5, b=-90.25) for pair in pairs]

    async def score_responses(self, items: Sequence[TokenPair]) -> list[float]:
        await self._work(len(items) / 2, [])
        return [-80.5] * len(items)

    async def _work(self, count: float, names: Sequence[str]) -> None:
        async def work(replica: _Serial, _: int) -> None:
            await replica.work(count)

        await self._pool.run(work, pairs=names)

    async def usage(self) -> list[RoleUsage]:
        return []


class FakeLearner:
    """Ranks that step together."""

    def __init__(self, *, ranks: int, latencies: Latencies) -> None:
        self._ranks = ranks
        self._latencies = latencies

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        await asyncio.gather(*(asyncio.sleep(self._latencies.step) for _ in range(self._ranks)))
        return StepResult(step=step, loss=0.6, metrics={"accuracy": 0.5, "grad_norm": 1.0, "learning_rate": 1e-6})

    async def push(self, version: int) -> int:
        """The update is the version's number."""
        await asyncio.sleep(self._latencies.push)
        return version

    async def save(self, folder: Path) -> None: ...

    async def load(self, folder: Path) -> None: ...

    async def usage(self) -> list[RoleUsage]:
        return []


class LedgerThread:
    """The real ledger in a thread of its own, one call at a time as in its actor; counts that thread's CPU."""

    def __init__(self, url: str, *, profile: Profile | None = None) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._profile = profile
        self.cpu_seconds = 0.0
        self.transactions = 0
        # A database in memory belongs to the thread that has opened it.
        self._ledger = self._thread.submit(PreferenceLedger, url).result()

    async def add_plans(self, plans: Sequence[PairPlan]) -> None:
        await self._do(self._ledger.add_plans, plans)

    async def add_responses(self, pairs: Sequence[ResponsePair]) -> None:
        await self._do(self._ledger.add_responses, pairs)

    async def add_labels(self, labels: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        await self._do(self._ledger.add_labels, labels, references)

    async def reject(self, pair_id: str, reason: str) -> None:
        await self._do(self._ledger.reject, pair_id, reason)

    async def mark_trained(self, step: int, pair_ids: Sequence[str]) -> None:
        await self._do(self._ledger.mark_trained, step, pair_ids)

    async def roll_back(self, step: int) -> int:
        return await self._do(self._ledger.roll_back, step)

    async def counts(self) -> LedgerCounts:
        return await self._do(self._ledger.counts)

    async def unfinished(self) -> tuple[list[PairPlan], list[ResponsePair], list[LabeledPair]]:
        return await self._do(self._ledger.unfinished)

    def close(self) -> None:
        self._thread.submit(self._ledger.close).result()
        self._thread.shutdown()

    async def _do(self, method: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, method, *arguments)

    def _timed(self, method: Callable[..., T], *arguments: Any) -> T:
        started = time.thread_time()
        if self._profile is not None:
            self._profile.enable()
        try:
            return method(*arguments)
        finally:
            if self._profile is not None:
                self._profile.disable()
            self.cpu_seconds += time.thread_time() - started
            self.transactions += 1


def _pool(role: str, workers: Sequence[T]) -> ReplicaPool[T]:
    """The pool of a run; nobody is lost here."""

    async def nothing(_: Any) -> None: ...

    async def no_replacement(_: int) -> T:
        raise AssertionError("no replica is lost")

    return ReplicaPool(role, workers, replace=no_replacement, end=nothing, ping=nothing, policy=SupervisionPolicy())


def _ids(pairs: Sequence[ResponsePair]) -> list[str]:
    return [pair.plan.pair_id for pair in pairs]
