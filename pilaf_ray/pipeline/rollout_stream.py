"""On-policy rollouts for the policy's own optimisation: the second stream through the generators.

     admit ──▶ one task a group ──▶ scored groups (heap by index) ──▶ next_batch, in order
       ▲       generates, then r̂ and the                                  │
       │       reference look at it, side by side                         ▼
       └──────────────── its own staleness gate ◀── release, when the step's weights are served

Rollouts are in no ledger: their plan is a function of the index, so a resumed run redoes
them from the checkpoint's step on, under the checkpoint's weights. A group that replicas die of is
set aside, and another, whose plan is a function of the same index, takes its place.
"""

import asyncio
import contextlib
import heapq
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from pilaf_ray.errors import PoisonPairError
from pilaf_ray.pipeline.gate import StalenessGate
from pilaf_ray.pipeline.ports import GeneratorPort, RewardScorer, TokenScorer
from pilaf_ray.pipeline.supervision import Report, no_report
from pilaf_ray.types import GenerationRequest, RolloutPlan, SampledResponse, ScoredGroup, ScoringItem

logger = logging.getLogger(__name__)

MAX_SUBSTITUTES = 8
"""More groups than chance explains that replicas die of, one after the other in one place."""


class RolloutStream:
    """Groups for steps ``start_step + 1`` to ``max_steps``; no group is older than the bound.

    The gate counts groups; why it bounds their age is said in :class:`StalenessGate`.

    Args:
        plan: the rollout plan at an index; a pure function of the index.
        batch_prompts: groups of one step.
        report: told of groups that are set aside.
    """

    def __init__(
        self,
        *,
        generator: GeneratorPort,
        reference: TokenScorer,
        reward: RewardScorer,
        plan: Callable[[int], RolloutPlan],
        batch_prompts: int,
        max_staleness_steps: int,
        start_step: int,
        max_steps: int,
        report: Report = no_report,
    ) -> None:
        self._generator = generator
        self._reference = reference
        self._reward = reward
        self._plan = plan
        self._report = report
        self._batch = batch_prompts
        self._next_planned = self._next_taken = start_step * batch_prompts
        self._end = max_steps * batch_prompts
        self._ready: list[tuple[int, ScoredGroup]] = []
        self._arrived = asyncio.Event()
        self._sampling: asyncio.Task[None] | None = None
        self.gate = StalenessGate(max_staleness_steps=max_staleness_steps, batch_pairs=batch_prompts)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sample while the block runs; what is under way at its end is dropped."""
        self._sampling = asyncio.create_task(self._sample(), name="rollout loop")
        self._sampling.add_done_callback(lambda _: self._arrived.set())
        try:
            yield
        finally:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)

    async def next_batch(self) -> list[ScoredGroup]:
        """The next groups in plan order, once all of them are scored; raises what stopped the sampling."""
        while not self._has_batch():
            assert self._sampling is not None, "enter running() first"
            if self._sampling.done():
                await self._sampling
            self._arrived.clear()
            await self._arrived.wait()
        self._next_taken += self._batch
        return [heapq.heappop(self._ready)[1] for _ in range(self._batch)]

    def release(self) -> None:
        """The weights of the step that took the last batch are served everywhere: as many may follow."""
        self.gate.release(self._batch)

    def _has_batch(self) -> bool:
        wanted = range(self._next_taken, self._next_taken + self._batch)
        found = {index for index, _ in self._ready}
        return all(index in found for index in wanted)

    async def _sample(self) -> None:
        """Consumes plan indices; produces scored groups. Waits for slots; unblocked by :meth:`release`."""
        async with asyncio.TaskGroup() as groups:
            while self._next_planned < self._end:
                count = min(await self.gate.wait_for_slot(), self._end - self._next_planned)
                self.gate.admit(count)
                for index in range(self._next_planned, self._next_planned + count):
                    groups.create_task(self._fill(index))
                self._next_planned += count

    async def _fill(self, index: int) -> None:
        """Produce the group at ``index``: the planned one, or the first substitute that nothing dies of.

        Raises:
            PoisonPairError: substitutes are no better.
        """
        for substitute in range(1 + MAX_SUBSTITUTES):
            # Plans behind the run's end are nobody else's.
            plan = replace(self._plan(index + substitute * self._end), index=index)
            try:
                group = await self._draw(plan)
            except PoisonPairError as error:
                cause = error
                logger.warning("rollout group %s is set aside: %s", plan.group_id, error)
                self._report("rollouts set aside", group=plan.group_id, prompt=plan.prompt.prompt_id, cause=str(error))
            else:
                heapq.heappush(self._ready, (index, group))
                self._arrived.set()
                return
        raise PoisonPairError(
            f"rollouts at index {index}: replicas died of {1 + MAX_SUBSTITUTES} groups one after the other, the last "
            f"time because: {cause}; look at the prompts, then continue with --resume"
        ) from cause

    async def _draw(self, plan: RolloutPlan) -> ScoredGroup:
        responding = [asyncio.ensure_future(self._respond(plan, n, seed)) for n, seed in enumerate(plan.seeds)]
        try:
            responses = await asyncio.gather(*responding)
        finally:
            # Where one of them is poison nobody wants the others.
            for response in responding:
                response.cancel()
        items = [ScoringItem(prompt=plan.prompt, token_ids=r.token_ids, text=r.text) for r in responses]
        scores, references = await asyncio.gather(
            self._reward.score(items),
            self._reference.score_tokens(
                [(plan.prompt.token_ids, r.token_ids) for r in responses], pairs=[_name(plan)]
            ),
        )
        return ScoredGroup(
            plan=plan,
            responses=tuple(responses),
            scores=scores,
            reference_logprobs=tuple(tuple(row) for row in references),
        )

    async def _respond(self, plan: RolloutPlan, number: int, seed: int) -> SampledResponse:
        return await self._generator.generate(
            GenerationRequest(
                request_id=f"{_name(plan)}-{number}",
                prompt_token_ids=plan.prompt.token_ids,
                coefficient=0.0,
                seed=seed,
            )
        )


def _name(plan: RolloutPlan) -> str:
    """What replicas that are lost over the group blame."""
    return f"rollout-{plan.group_id}"
