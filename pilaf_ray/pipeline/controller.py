"""The loops that move pairs between the roles.

     plan loop ──▶ one task a pair ──▶ label loop ──▶ schedule (batches in order) ──▶ learner loop
        ▲          samples a and b      oracle and                                      │
        │                               reference, side by side                         │ pushed version
        │       refused │                   │ abstained                                 ▼
        └─ staleness gate ◀─┴───────────────┴────────────── slots ◀──────────────── sync loop

The controller holds no model, no Ray and no torch. Everything that must survive is in
the store before the next loop sees it.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pilaf_ray.errors import OracleError, PilafError, PoisonPairError, PromptError
from pilaf_ray.pipeline.budget import RunBudget, Spent
from pilaf_ray.pipeline.gate import StalenessGate
from pilaf_ray.pipeline.pair_sampling import PairSource, SidePairs
from pilaf_ray.pipeline.ports import Ports
from pilaf_ray.pipeline.schedule import Schedule, TrainingBatch
from pilaf_ray.types import LabeledPair, PairPlan, PreferenceLabel, ResponsePair, StepResult

logger = logging.getLogger(__name__)

STOPPED = "a request to stop"
MAX_ENDED_IN_A_ROW = 256
"""Abstentions, or refusals: more than chance explains for any oracle or prompts that are worth having."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One learner step as the controller saw it."""

    result: StepResult
    batch: Sequence[LabeledPair]
    ages: Sequence[int]
    """Policy versions between sampling and training, pair by pair."""
    wait_seconds: float
    train_seconds: float
    push_seconds: float
    """The ledger's write and the learner's part of the weight update, which it cannot train through."""
    sync_seconds: float
    """What it took until every generator served the version before this one."""
    in_flight: int
    is_first_use: bool = True
    """Whether the batch's pairs were trained on for the first time."""
    spent: Spent | None = None
    """By the run, this step included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfinishedWork:
    """What an interrupted run left behind."""

    planned: Sequence[PairPlan] = ()
    sampled: Sequence[ResponsePair] = ()
    labeled: Sequence[LabeledPair] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _PushedStep:
    """A version on its way to the generators, and the slots that it will free."""

    step: int
    update: Any
    slots: int


class Controller:
    """Runs steps from ``start_step + 1`` until the budget is spent.

    Args:
        plan: the pair plan at an index; a pure function of the index.
        next_index: index of the first new plan.
        schedule: which pairs each step trains on; it stands at ``start_step``.
        max_staleness_steps: windows of the schedule that may be sampled ahead.
        after_step: called while the learner holds the step's weights; may checkpoint.
        after_sync: called with a step when every generator serves it; may evaluate. The learner
            goes on meanwhile, but serves nothing newer until the call returns.
        pairs: makes pairs of plans; both sides as planned when left out.
        fail_fast: a pair that cannot be sampled ends the run; otherwise it is rejected, counted and replaced.
    """

    def __init__(
        self,
        *,
        ports: Ports,
        plan: Callable[[int], PairPlan],
        next_index: int,
        schedule: Schedule,
        budget: RunBudget,
        max_staleness_steps: int,
        label_batch_pairs: int,
        start_step: int,
        after_step: Callable[[StepReport], Awaitable[None]],
        after_sync: Callable[[int], Awaitable[None]],
        unfinished: UnfinishedWork | None = None,
        fail_fast: bool = False,
        clock: Callable[[], float] = time.monotonic,
        pairs: PairSource | None = None,
    ) -> None:
        self._ports = ports
        self._pairs = pairs or SidePairs(ports.generator)
        self._plan = plan
        self._next_index = next_index
        self._schedule = schedule
        self._budget = budget
        self._label_batch = label_batch_pairs
        self._step = start_step
        self._served = schedule.served_version(start_step)
        self._after_step = after_step
        self._after_sync = after_sync
        self._pushed: asyncio.Queue[_PushedStep] = asyncio.Queue()
        self._sync_seconds = 0.0
        self._clock = clock
        self._fail_fast = fail_fast
        self.ended_by: str | None = None
        """The setting whose limit ended the run, or ``a request to stop``; None while it runs."""
        self.gate = StalenessGate(max_staleness_steps=max_staleness_steps, batch_pairs=schedule.window_pairs)
        self._abstained_in_a_row = 0
        self._refused_in_a_row = 0
        self._sampled: asyncio.Queue[ResponsePair] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._stop = False
        self._unfinished = unfinished or UnfinishedWork()
        self._planned = deque(self._unfinished.planned)
        retired = schedule.retired(start_step)
        # Pairs that will be trained on: those in flight and those still to be planned.
        self._to_plan = schedule.introduced(budget.max_steps) - retired
        # Slots of pairs that are done with, in a window that is not.
        self.gate.admit(retired - schedule.retired(self._served))

    @property
    def step(self) -> int:
        """The last step that is finished."""
        return self._step

    def request_stop(self) -> None:
        """Finish the step under way, then return from :meth:`run`."""
        self._stop = True
        self._changed.set()

    async def run(self) -> int:
        """Run until done, stopped or failed; returns the last finished step.

        The first error of any loop cancels the others and is raised as itself.
        """
        learner = asyncio.create_task(self._learner_loop(), name="learner loop")
        workers = [
            asyncio.create_task(self._plan_loop(), name="plan loop"),
            asyncio.create_task(self._label_loop(), name="label loop"),
            asyncio.create_task(self._sync_loop(), name="sync loop"),
        ]
        try:
            done, _ = await asyncio.wait([learner, *workers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if error := task.exception():
                    raise _first(error)
            # Workers run until cancelled, so the learner loop has come to its end.
        finally:
            for task in (learner, *workers):
                task.cancel()
            await asyncio.gather(learner, *workers, return_exceptions=True)
        return self._step

    async def _plan_loop(self) -> None:
        """Consumes plan indices and the unfinished work of an earlier attempt.

        Produces responses. Waits for a slot of the gate; unblocked by the learner loop
        (slots of trained pairs), the label loop (slots of abstained pairs) refused and rejected pairs.
        """
        async with asyncio.TaskGroup() as sampling:
            self._resume()
            while True:
                count = min(await self.gate.wait_for_slot(), len(self._planned) + self._to_plan)
                if count == 0:
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                plans = self._take_plans(count)
                self._take(plans)
                await self._ports.store.add_plans(plans)
                for plan in plans:
                    sampling.create_task(self._sample(plan))

    def _resume(self) -> None:
        """Put unfinished pairs back where they were.

        Pairs that are only planned wait for the gate like new ones: sampled at once, under
        the weights of the checkpoint, they would be too old when their turn comes.
        """
        left = self._unfinished
        taken = [*(pair.plan for pair in left.sampled), *(item.pair.plan for item in left.labeled)]
        self._to_plan = max(0, self._to_plan - len(taken) - len(self._planned))
        self._take(taken)
        for pair in left.sampled:
            self._sampled.put_nowait(pair)
        for item in left.labeled:
            self._schedule.add(item)
        self._changed.set()

    def _take_plans(self, count: int) -> list[PairPlan]:
        """The next ``count`` plans: those of an earlier attempt first, then new ones."""
        plans = [self._planned.popleft() for _ in range(min(count, len(self._planned)))]
        new = count - len(plans)
        plans += [self._plan(self._next_index + offset) for offset in range(new)]
        self._next_index += new
        self._to_plan -= new
        return plans

    def _take(self, plans: Sequence[PairPlan]) -> None:
        self.gate.admit(len(plans))
        self._schedule.open([plan.index for plan in plans])

    async def _sample(self, plan: PairPlan) -> None:
        """Let the sampler make a pair of the plan, and hand it on; one that cannot be had is refused."""
        try:
            pair = await self._pairs.draw(plan)
            for side, response in (("a", pair.a), ("b", pair.b)):
                # The end of a response is a token too, so an answer that says nothing still has one.
                if not response.token_ids:
                    raise PromptError(f"side {side} came back without a token")
        except PromptError as error:
            await self._refuse(plan, error)
        except PoisonPairError as error:
            await self._reject(plan, error)
        else:
            self._refused_in_a_row = 0
            self._sampled.put_nowait(pair)

    async def _refuse(self, plan: PairPlan, error: PromptError) -> None:
        """REJECTED with its reason, and replaced; too many in a row mean that the prompts are at fault."""
        self._refused_in_a_row += 1
        if self._fail_fast or self._refused_in_a_row >= MAX_ENDED_IN_A_ROW:
            raise PromptError(
                f"pair {plan.pair_id} of prompt {plan.prompt.prompt_id} cannot be sampled, the "
                f"{self._refused_in_a_row}. in a row: {error}; mend the prompts, then continue with --resume"
            ) from error
        logger.warning("pair %s is rejected: %s", plan.pair_id, error)
        await self._reject(plan, error)

    def _end(self, plan: PairPlan) -> None:
        """The pair leaves the order; one planned later, under newer weights, replaces it."""
        self._schedule.close(plan.index)
        self._to_plan += 1
        self.gate.release(1)

    async def _label_loop(self) -> None:
        """Consumes sampled pairs in small batches; produces labelled pairs.

        Waits for the first sampled pair and takes what else is there; unblocked by any
        finished generation. Several batches are labelled at once, so a slow oracle does
        not hold up the reference.
        """
        async with asyncio.TaskGroup() as labelling:
            while True:
                pairs = [await self._sampled.get()]
                while len(pairs) < self._label_batch and not self._sampled.empty():
                    pairs.append(self._sampled.get_nowait())
                await self._ports.store.add_responses(pairs)
                labelling.create_task(self._label(pairs))

    async def _reject(self, plan: PairPlan, error: PilafError) -> None:
        """Set the pair aside with its cause."""
        await self._ports.store.reject(plan.pair_id, str(error))
        self._end(plan)
        self._changed.set()

    async def _label(self, pairs: Sequence[ResponsePair]) -> None:
        try:
            labels, references = await asyncio.gather(
                self._ports.oracle.label(pairs), self._ports.reference.score(pairs)
            )
        except PoisonPairError as error:
            if len(pairs) == 1:
                await self._reject(pairs[0].plan, error)
            for pair in pairs if len(pairs) > 1 else ():
                await self._label([pair])
            return
        await self._ports.store.add_labels(labels, references)
        for pair, label, reference in zip(pairs, labels, references, strict=True):
            if label.is_abstention:
                self._count_abstention(label)
                self._end(pair.plan)
            else:
                self._abstained_in_a_row = 0
                self._schedule.add(LabeledPair(pair=pair, label=label, reference=reference))
        self._changed.set()

    def _count_abstention(self, label: PreferenceLabel) -> None:
        """An oracle that never answers would have pairs replaced without end."""
        self._abstained_in_a_row += 1
        if self._abstained_in_a_row >= MAX_ENDED_IN_A_ROW:
            raise OracleError(
                f"the oracle abstained from {self._abstained_in_a_row} pairs in a row, the last time because: "
                f"{label.reason or 'no reason given'}; look at the oracle, then continue with --resume"
            )

    async def _learner_loop(self) -> None:
        """Consumes the schedule's batches of labelled pairs; produces pushed versions.

        Waits for the next pairs of the schedule, even where later ones are ready: that is
        what bounds the age. Unblocked by the label loop, and by the sync loop when two
        versions would be under way at once.
        """
        while True:
            started = self._clock()
            batch = await self._wait_for_batch()
            if batch is None:
                break
            step = self._step + 1
            taken = self._clock()
            result = await self._ports.learner.train_step(step, batch.items)
            trained = self._clock()
            if batch.is_last_use:
                await self._ports.store.mark_trained(step, [item.pair_id for item in batch.items])
            if batch.is_first_use:
                self._budget.count(batch.items)
            update = await self._push(step) if batch.publishes else None
            self._step = step
            await self._after_step(
                StepReport(
                    result=result,
                    batch=batch.items,
                    ages=[step - 1 - item.pair.min_policy_version for item in batch.items],
                    wait_seconds=taken - started,
                    train_seconds=trained - taken,
                    push_seconds=self._clock() - trained,
                    sync_seconds=self._sync_seconds,
                    in_flight=self.gate.in_flight,
                    is_first_use=batch.is_first_use,
                    spent=self._budget.spent,
                )
            )
            if batch.publishes:
                self._serve(step, update, slots=batch.slots)
        if self._served < self._step and not self._stop:
            # The run ends within a round: what is evaluated is what was trained.
            self._serve(self._step, await self._push(self._step), slots=0)
        await self._pushed.join()

    async def _push(self, step: int) -> Any:
        await self._pushed.join()
        return await self._ports.weight_sync.push(step)

    def _serve(self, step: int, update: Any, *, slots: int) -> None:
        self._served = step
        self._pushed.put_nowait(_PushedStep(step=step, update=update, slots=slots))

    async def _sync_loop(self) -> None:
        """Consumes pushed versions; produces free slots of the gate.

        The learner takes its next step meanwhile, if a batch is ready. Slots are released
        only when the new weights are served everywhere, which is what keeps the bound.
        """
        while True:
            pushed = await self._pushed.get()
            started = self._clock()
            await self._ports.weight_sync.serve(pushed.step, pushed.update)
            self._sync_seconds = self._clock() - started
            self.gate.release(pushed.slots)
            await self._after_sync(pushed.step)
            self._pushed.task_done()

    async def _wait_for_batch(self) -> TrainingBatch | None:
        """The next batch, or None when the budget is spent or a stop was requested."""
        while True:
            self.ended_by = STOPPED if self._stop else self._budget.ended_by(self._step)
            if self.ended_by is not None:
                return None
            batch = self._schedule.next()
            if batch is not None:
                return batch
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._budget.seconds_left)


def _first(error: BaseException) -> BaseException:
    """The error that started it, out of the groups that task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
