"""The front half of the controller's loops: from plan indices to labelled pairs in the schedule."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from pilaf_ray.errors import PilafError, PoisonPairError, PromptError
from pilaf_ray.pipeline.gate import StalenessGate
from pilaf_ray.pipeline.labelling import MAX_ENDED_IN_A_ROW, Labelling
from pilaf_ray.pipeline.pair_sampling import PairSource
from pilaf_ray.pipeline.ports import OraclePort, ReferencePort, StorePort
from pilaf_ray.pipeline.schedule import Schedule
from pilaf_ray.store.records import UnfinishedWork
from pilaf_ray.types import LabeledPair, PairPlan

logger = logging.getLogger(__name__)


class PairSupply:
    """Plans pairs and has them sampled and labelled; one that ends without a label is replaced later.

    Args:
        pairs: makes pairs of plans.
        plan: the pair plan at an index; a pure function of the index.
        next_index: index of the first new plan.
        to_plan: pairs that will be trained on and are still to be planned, or were unfinished.
        schedule: told of pairs that begin and end, and given the labelled ones.
        gate: admits pairs.
        changed: set whenever the schedule may have a batch, or a pair has to be replaced.
        label_batch_pairs: most pairs that are labelled in one call.
        unfinished: what an interrupted run left behind.
        fail_fast: a pair that cannot be sampled ends the run; otherwise it is rejected, counted and replaced.
    """

    def __init__(
        self,
        *,
        pairs: PairSource,
        oracle: OraclePort,
        reference: ReferencePort,
        store: StorePort,
        plan: Callable[[int], PairPlan],
        next_index: int,
        to_plan: int,
        schedule: Schedule,
        gate: StalenessGate,
        changed: asyncio.Event,
        label_batch_pairs: int,
        unfinished: UnfinishedWork,
        fail_fast: bool,
    ) -> None:
        self._pairs = pairs
        self._store = store
        self._plan = plan
        self._next_index = next_index
        self._to_plan = to_plan
        self._schedule = schedule
        self._gate = gate
        self._changed = changed
        self._unfinished = unfinished
        self._planned = deque(unfinished.planned)
        self._fail_fast = fail_fast
        self._refused_in_a_row = 0
        self.labelling = Labelling(
            oracle=oracle,
            reference=reference,
            store=store,
            batch_pairs=label_batch_pairs,
            labelled=self._labelled,
            reject=self._reject,
        )
        """What becomes of the pairs once they are sampled; runs beside the plan loop."""

    async def plan_loop(self) -> None:
        """Consumes plan indices and the unfinished work of an earlier attempt.

        Produces sampled pairs. Waits for a slot of the gate; unblocked by the sync loop (slots of trained
        pairs), the labelling (slots of abstained pairs), and pairs that are refused or rejected.
        """
        async with asyncio.TaskGroup() as sampling:
            self._resume()
            while True:
                count = min(await self._gate.wait_for_slot(), len(self._planned) + self._to_plan)
                if count == 0:
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                plans = self._take_plans(count)
                self._take(plans)
                await self._store.add_plans(plans)
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
            self.labelling.add(pair)
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
        self._gate.admit(len(plans))
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
            self.labelling.add(pair)

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

    def _labelled(self, items: Sequence[LabeledPair], abstained: Sequence[PairPlan]) -> None:
        """They are in the ledger."""
        for item in items:
            self._schedule.add(item)
        for plan in abstained:
            self._end(plan)
        self._changed.set()

    async def _reject(self, plan: PairPlan, error: PilafError) -> None:
        """Set the pair aside with its cause."""
        await self._store.reject(plan.pair_id, str(error))
        self._end(plan)
        self._changed.set()

    def _end(self, plan: PairPlan) -> None:
        """The pair leaves the order; one planned later, under newer weights, replaces it."""
        self._schedule.close(plan.index)
        self._to_plan += 1
        self._gate.release(1)
