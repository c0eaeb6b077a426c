"""The way of sampled pairs to their labels.

     sampled ──▶ ledger ──▶ batches, side by side ──▶ ledger ──▶ labelled
                            oracle and reference

What comes while the ledger writes goes into its next transaction: under load transactions grow, and
pairs that come one by one wait for nobody.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from pilaf_ray.errors import OracleError, PilafError, PoisonPairError
from pilaf_ray.pipeline.ports import OraclePort, ReferencePort, StorePort
from pilaf_ray.types import LabeledPair, PairPlan, PreferenceLabel, ReferenceLogprobs, ResponsePair

T = TypeVar("T")

MAX_ENDED_IN_A_ROW = 256
"""Abstentions, or refusals: more than chance explains for any oracle or prompts that are worth having."""

_Answer = tuple[ResponsePair, PreferenceLabel, ReferenceLogprobs]


class Labelling:
    """Asks oracle and reference about pairs, with the ledger before and after.

    Args:
        batch_pairs: pairs that go to the oracle and the reference at once.
        labelled: told of pairs with their labels, and of plans that the oracle abstained from, once
            they are in the ledger.
        reject: sets a pair aside that no oracle or reference survives.
    """

    def __init__(
        self,
        *,
        oracle: OraclePort,
        reference: ReferencePort,
        store: StorePort,
        batch_pairs: int,
        labelled: Callable[[Sequence[LabeledPair], Sequence[PairPlan]], None],
        reject: Callable[[PairPlan, PilafError], Awaitable[None]],
    ) -> None:
        self._oracle, self._reference, self._store = oracle, reference, store
        self._batch_pairs = batch_pairs
        self._labelled, self._reject = labelled, reject
        self._sampled: asyncio.Queue[ResponsePair] = asyncio.Queue()
        self._answered: asyncio.Queue[list[_Answer]] = asyncio.Queue()
        self._abstained_in_a_row = 0

    def add(self, pair: ResponsePair) -> None:
        """A pair is sampled."""
        self._sampled.put_nowait(pair)

    async def run(self) -> None:
        """Until cancelled; an error of one pair's way ends all of them."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._label_loop())
            loops.create_task(self._record_loop())

    async def _label_loop(self) -> None:
        """Consumes sampled pairs; produces answers.

        Waits for the first sampled pair and takes what else is there; unblocked by any
        finished generation. Several batches are labelled at once, so a slow oracle does
        not hold up the reference.
        """
        async with asyncio.TaskGroup() as asking:
            while True:
                pairs = await _all_there(self._sampled)
                await self._store.add_responses(pairs)
                for start in range(0, len(pairs), self._batch_pairs):
                    asking.create_task(self._ask(pairs[start : start + self._batch_pairs]))

    async def _ask(self, pairs: Sequence[ResponsePair]) -> None:
        try:
            labels, references = await asyncio.gather(self._oracle.label(pairs), self._reference.score(pairs))
        except PoisonPairError as error:
            if len(pairs) == 1:
                await self._reject(pairs[0].plan, error)
            for pair in pairs if len(pairs) > 1 else ():
                await self._ask([pair])
            return
        self._answered.put_nowait(list(zip(pairs, labels, references, strict=True)))

    async def _record_loop(self) -> None:
        """Consumes answers; produces labelled pairs. Waits for the first answers; unblocked by any batch."""
        while True:
            answers = [answer for batch in await _all_there(self._answered) for answer in batch]
            await self._store.add_labels([label for _, label, _ in answers], [score for _, _, score in answers])
            items: list[LabeledPair] = []
            abstained: list[PairPlan] = []
            for pair, label, reference in answers:
                if label.is_abstention:
                    self._count_abstention(label)
                    abstained.append(pair.plan)
                else:
                    self._abstained_in_a_row = 0
                    items.append(LabeledPair(pair=pair, label=label, reference=reference))
            self._labelled(items, abstained)

    def _count_abstention(self, label: PreferenceLabel) -> None:
        """An oracle that never answers would have pairs replaced without end."""
        self._abstained_in_a_row += 1
        if self._abstained_in_a_row >= MAX_ENDED_IN_A_ROW:
            raise OracleError(
                f"the oracle abstained from {self._abstained_in_a_row} pairs in a row, the last time because: "
                f"{label.reason or 'no reason given'}; look at the oracle, then continue with --resume"
            )


async def _all_there(queue: "asyncio.Queue[T]") -> list[T]:
    """Everything in the queue, and at least one thing."""
    found = [await queue.get()]
    while not queue.empty():
        found.append(queue.get_nowait())
    return found
