"""Sampled pairs on their way to labels: what goes into one transaction, and what into one question."""

import asyncio
from collections.abc import Sequence
from typing import Any

from pairs import label, pair, reference

from pilaf_ray.pipeline.labelling import Labelling
from pilaf_ray.types import LabeledPair, PairPlan, PreferenceLabel, ReferenceLogprobs, ResponsePair


class Roles:
    """Oracle, reference and ledger. The ledger's writes end when they are let; pair 4 is abstained from."""

    def __init__(self) -> None:
        self.sampled: list[list[int]] = []
        self.recorded: list[list[str]] = []
        self.asked: list[list[int]] = []
        self.may_write = asyncio.Semaphore(0)

    async def add_responses(self, pairs: Sequence[ResponsePair]) -> None:
        self.sampled.append([item.plan.index for item in pairs])
        await self.may_write.acquire()

    async def add_labels(self, labels: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        assert [item.pair_id for item in labels] == [item.pair_id for item in references]
        self.recorded.append([item.pair_id for item in labels])
        await self.may_write.acquire()

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        self.asked.append([item.plan.index for item in pairs])
        return [label(item.plan.index, None if item.plan.index == 4 else 1.0) for item in pairs]

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        return [reference(item.plan.index) for item in pairs]


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_what_comes_during_a_write_goes_into_the_next_and_questions_keep_their_size() -> None:
    roles, labelled, abstained = Roles(), [], []

    def note(items: Sequence[LabeledPair], plans: Sequence[PairPlan]) -> None:
        labelled.extend(item.pair.plan.index for item in items)
        abstained.extend(plan.index for plan in plans)

    async def reject(*_: Any) -> None:
        raise AssertionError("nothing is rejected here")

    ports: Any = roles
    labelling = Labelling(oracle=ports, reference=ports, store=ports, batch_pairs=3, labelled=note, reject=reject)
    running = asyncio.create_task(labelling.run())
    labelling.add(pair(0))
    await settle()
    for index in range(1, 8):
        labelling.add(pair(index))
    await settle()
    assert (roles.sampled, roles.asked) == ([[0]], []), "nobody is asked before the responses are on disk"
    roles.may_write.release()
    await settle()
    assert roles.sampled == [[0], [1, 2, 3, 4, 5, 6, 7]]
    assert (roles.asked, roles.recorded, labelled) == ([[0]], [["pair-0"]], []), "a label counts once it is on disk"
    roles.may_write.release()
    roles.may_write.release()
    await settle()
    assert roles.asked == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert roles.recorded == [["pair-0"], [f"pair-{index}" for index in range(1, 8)]]
    assert (labelled, abstained) == ([0], [])
    roles.may_write.release()
    await settle()
    assert (labelled, abstained) == ([0, 1, 2, 3, 5, 6, 7], [4])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}
