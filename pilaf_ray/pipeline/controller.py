"""The loops that move pairs between the roles.

     plan loop ──▶ one task a pair ──▶ labelling ──▶ schedule (batches in order) ──▶ learner loop
        ▲          samples a and b     oracle and                                      │
        │                              reference, side by side                         │ pushed version
        │       refused │                  │ abstained                                 ▼
        └─ staleness gate ◀─┴──────────────┴────────────── slots ◀──────────────── sync loop

The plan loop is in ``pair_supply.py``, the labelling in ``labelling.py``, learner and sync loop here. The
controller holds no model, no Ray and no torch. Everything that must survive is in the store before the
next loop sees it.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pilaf_ray.errors import first_cause
from pilaf_ray.pipeline.budget import RunBudget
from pilaf_ray.pipeline.gate import StalenessGate
from pilaf_ray.pipeline.held_out import Due, HeldOutQueue
from pilaf_ray.pipeline.pair_sampling import PairSource, SidePairs
from pilaf_ray.pipeline.pair_supply import PairSupply
from pilaf_ray.pipeline.ports import Ports
from pilaf_ray.pipeline.schedule import Schedule, TrainingBatch
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.pipeline.turns import Turn, own_device
from pilaf_ray.store.records import UnfinishedWork
from pilaf_ray.types import PairPlan

STOPPED = "a request to stop"


def _never(_: int) -> None:
    """No version is evaluated."""


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
        after_sync: called with a step when every generator serves it.
        evaluate: how to evaluate a step; begun next, unless a stop was requested. The learner goes on meanwhile, but
            serves nothing newer until it has sampled; scoring is done beside all else. A stop waits for neither.
        pairs: makes pairs of plans; both sides as planned when left out.
        fail_fast: a pair that cannot be sampled ends the run; otherwise it is rejected, counted and replaced.
        turn: the learner's on a device that it shares with the generators, which must have served what was
            published before.
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
        evaluate: Due = _never,
        unfinished: UnfinishedWork | None = None,
        fail_fast: bool = False,
        clock: Callable[[], float] = time.monotonic,
        pairs: PairSource | None = None,
        turn: Turn = own_device,
    ) -> None:
        self._ports = ports
        self._turn = turn
        self._schedule = schedule
        self._budget = budget
        self._step = start_step
        self._served = schedule.served_version(start_step)
        self._after_step = after_step
        self._after_sync, self._held_out = after_sync, HeldOutQueue(evaluate)
        self._pushed: asyncio.Queue[_PushedStep] = asyncio.Queue()
        self._synced = asyncio.Event()
        """Set while no version is on its way, and for good once a stop was requested: that waits for none."""
        self._synced.set()
        self._sync_seconds = 0.0
        self._evaluated = (-math.inf, -math.inf)
        """When the last evaluation that is over began and ended."""
        self._held_seconds = 0.0
        """What the step under way has waited for an evaluation."""
        self._clock = clock
        self.ended_by: str | None = None
        """The setting whose limit ended the run, or why it was to stop; None while it runs."""
        self.gate = StalenessGate(max_staleness_steps=max_staleness_steps, batch_pairs=schedule.window_pairs)
        self._changed = asyncio.Event()
        self._stop: str | None = None
        """Why the run is to stop; None while nobody has asked for it."""
        retired = schedule.retired(start_step)
        # Slots of pairs that are done with, in a window that is not.
        self.gate.admit(retired - schedule.retired(self._served))
        self._supply = PairSupply(
            pairs=pairs or SidePairs(ports.generator),
            oracle=ports.oracle,
            reference=ports.reference,
            store=ports.store,
            plan=plan,
            next_index=next_index,
            to_plan=schedule.introduced(budget.max_steps) - retired,
            schedule=schedule,
            gate=self.gate,
            changed=self._changed,
            label_batch_pairs=label_batch_pairs,
            unfinished=unfinished or UnfinishedWork(),
            fail_fast=fail_fast,
        )

    @property
    def step(self) -> int:
        """The last step that is finished."""
        return self._step

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was requested."""
        return self._stop is not None

    def request_stop(self, reason: str = STOPPED) -> None:
        """Finish the step under way, then return from :meth:`run`, ended by the first ``reason`` that was given.

        Versions on their way to the generators are left there: a run that is resumed serves its checkpoint's.
        """
        self._stop = self._stop or reason
        self._changed.set()
        self._synced.set()
        self._held_out.give_up()

    async def run(self) -> int:
        """Run until done, stopped or failed; returns the last finished step.

        The first error of any loop cancels the others and is raised as itself.
        """
        learner = asyncio.create_task(self._learner_loop(), name="learner loop")
        workers = [
            asyncio.create_task(self._supply.plan_loop(), name="plan loop"),
            asyncio.create_task(self._supply.labelling.run(), name="label and record loops"),
            asyncio.create_task(self._sync_loop(), name="sync loop"),
            asyncio.create_task(self._held_out.run(), name="scoring of evaluations"),
        ]
        try:
            done, _ = await asyncio.wait([learner, *workers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if error := task.exception():
                    raise first_cause(error)
            # Workers run until cancelled, so the learner loop has come to its end.
        finally:
            for task in (learner, *workers):
                task.cancel()
            await asyncio.gather(learner, *workers, return_exceptions=True)
        return self._step

    async def _learner_loop(self) -> None:
        """Consumes the schedule's batches of labelled pairs; produces pushed versions.

        Waits for the next pairs of the schedule, even where later ones are ready: that is
        what bounds the age. Unblocked by the labelling, and by the sync loop when two
        versions would be under way at once.
        """
        while True:
            started = self._clock()
            batch = await self._wait_for_batch()
            if batch is None:
                break
            if self._turn is not own_device:
                # Whoever waits inside a turn for what is served in another's waits for ever.
                await self._wait_until_served()
            if self._stop:
                continue
            async with self._turn():
                if self._stop:
                    continue
                update = await self._take_step(batch, started)
            if batch.publishes:
                self._serve(self._step, update, slots=batch.slots)
        if self._served < self._step and not self._stop:
            # The run ends within a round: what is evaluated is what was trained.
            self._serve(self._step, await self._push(self._step), slots=0)
        await self._synced.wait()
        await self._held_out.finished()

    async def _take_step(self, batch: TrainingBatch, started: float) -> Any:
        """Train on ``batch``, for which the loop has waited since ``started``; returns what was pushed, if anything."""
        step = self._step + 1
        taken, held_before = self._clock(), self._held_seconds
        result = await self._ports.learner.train_step(step, batch.items)
        trained = self._clock()
        if batch.is_last_use:
            await self._ports.store.mark_trained(step, [item.pair_id for item in batch.items])
        if batch.is_first_use:
            self._budget.count(batch.items)
        update = await self._push(step) if batch.publishes else None
        self._step = step
        held, self._held_seconds = self._held_seconds, 0.0
        await self._after_step(
            StepReport(
                result=result,
                batch=batch.items,
                ages=[step - 1 - item.pair.min_policy_version for item in batch.items],
                wait_seconds=taken - started - held_before,
                train_seconds=trained - taken,
                push_seconds=self._clock() - trained - (held - held_before),
                evaluation_seconds=held,
                sync_seconds=self._sync_seconds,
                in_flight=self.gate.in_flight,
                is_first_use=batch.is_first_use,
                spent=self._budget.spent,
            )
        )
        return update

    async def _push(self, step: int) -> Any:
        """What was published; None where a stop was requested, because nobody will serve it."""
        await self._wait_until_served()
        return None if self._stop else await self._ports.weight_sync.push(step)

    async def _wait_until_served(self) -> None:
        """Return when no version is on its way, nor evaluated; counts what of it was an evaluation."""
        started = self._clock()
        await self._synced.wait()
        began, ended = self._evaluated
        self._held_seconds += max(0.0, ended - max(began, started))

    def _serve(self, step: int, update: Any, *, slots: int) -> None:
        if self._stop:
            return
        self._served = step
        self._synced.clear()
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
            began = self._clock()
            await self._held_out.sample(pushed.step)
            self._evaluated = began, self._clock()
            self._synced.set()

    async def _wait_for_batch(self) -> TrainingBatch | None:
        """The next batch, or None when the budget is spent or a stop was requested."""
        while True:
            self.ended_by = self._stop or self._budget.ended_by(self._step)
            if self.ended_by is not None:
                return None
            batch = self._schedule.next()
            if batch is not None:
                return batch
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._budget.seconds_left)
