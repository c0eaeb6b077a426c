"""The controller's loops where generators and learner share a device: no deadlock, same batches, same bound."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import pytest
from test_controller import World, controller

from pilaf_ray.pipeline.schedule import IterativeSchedule
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.pipeline.turns import TurnTaking
from pilaf_ray.types import GenerationRequest, LabeledPair, PairState, SampledResponse, StepResult


class SharingWorld(World):
    """Generators and learner use one device as the adapters do: calls in turns, pushes inside the learner's."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.turns = TurnTaking()
        self.there = "nobody"

    async def start(self) -> None:
        for role in ("generator", "learner"):
            async with self.turns.turn(role):
                self.there = role
                self.turns.join(role, rest=self._rest, resume=self._resumes(role))

    async def _rest(self) -> None:
        await self.wander()
        self.there = "nobody"

    def _resumes(self, role: str) -> Callable[[], object]:
        async def resume() -> None:
            assert self.there == "nobody"
            await self.wander()
            self.there = role

        return resume  # type: ignore[return-value]

    async def generate(self, request: GenerationRequest) -> SampledResponse:
        async with self.turns.turn("generator"):
            assert self.there == "generator"
            return await super().generate(request)

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        async with self.turns.within("learner"):
            assert self.there == "learner"
            return await super().train_step(step, batch)

    async def push(self, version: int) -> str:
        async with self.turns.within("learner"):
            assert self.there == "learner"
            return await super().push(version)

    async def serve(self, version: int, update: str) -> None:
        async with self.turns.turn("generator"):
            assert self.there == "generator"
            await super().serve(version, update)


async def run(world: SharingWorld, reports: list[StepReport], **settings: object) -> int:
    await world.start()
    turn = partial(world.turns.turn, "learner")
    # Nothing here takes time: what does not end soon waits for ever.
    async with asyncio.timeout(60):
        return await controller(world, reports, turn=turn, **settings).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
async def test_a_run_ends_and_keeps_the_bound(staleness: int, seed: int) -> None:
    world, alone, reports = SharingWorld(seed=seed), World(seed=seed), []
    assert await run(world, reports, staleness=staleness) == 50
    await controller(alone, [], staleness=staleness).run()
    assert world.trained == alone.trained, "the same pairs in the same order"
    ages = [age for report in reports for age in report.ages]
    assert max(ages) == staleness and min(ages) >= 0
    # The start of both, to and fro once a step, and the last weights are served; what is sampled ahead saves no turn.
    assert world.turns.changes == 2 + 2 * 50 + 1


async def test_a_round_is_two_turns() -> None:
    world, reports = SharingWorld(), []
    schedule = IterativeSchedule(batch_pairs=4, pairs_per_round=16, epochs=2, seed=0)
    assert await run(world, reports, staleness=0, steps=24, schedule=schedule) == 24
    # Three rounds of eight steps; the first batch of a round trains while its last pairs are labelled.
    assert world.turns.changes <= 2 + 3 * 2 * 2


async def test_a_request_to_stop_is_heard_at_rest() -> None:
    world, reports = SharingWorld(), []
    await world.start()
    asked = controller(world, reports, staleness=1, turn=partial(world.turns.turn, "learner"))
    running = asyncio.create_task(asked.run())
    while asked.step < 3:
        await asyncio.sleep(0)
    asked.request_stop()
    async with asyncio.timeout(60):
        assert await running == asked.step >= 3


async def test_a_stop_leaves_a_pull_that_lasts_for_ever_and_takes_no_turn_for_another_step() -> None:
    pulling = asyncio.Event()

    class Stuck(SharingWorld):
        async def serve(self, version: int, update: str) -> None:
            if version == 3:
                async with self.turns.turn("generator"):
                    pulling.set()
                    await asyncio.Event().wait()
            await super().serve(version, update)

    world = Stuck()
    await world.start()
    asked = controller(world, [], staleness=2, turn=partial(world.turns.turn, "learner"))
    async with asyncio.timeout(60):
        running = asyncio.create_task(asked.run())
        await pulling.wait()
        while world.states.get("pair-15") != PairState.LABELED:
            await asyncio.sleep(0)
        asked.request_stop()
        assert await running == 3
        # The device is there for the checkpoint.
        async with world.turns.within("learner"):
            assert world.there == "learner"
