"""Which pairs a step trains on, and after which steps the policy is handed out."""

import bisect
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pilaf_ray.sampling.identity import derive_seed
from pilaf_ray.types import LabeledPair


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """The pairs of one step, and what follows from it."""

    items: Sequence[LabeledPair]
    is_first_use: bool
    """Whether the pairs are trained on for the first time."""
    is_last_use: bool
    """Whether they are trained on for the last time, and so are TRAINED in the ledger."""
    publishes: bool
    """Whether the generators are given the weights of this step."""
    slots: int
    """Slots of the gate that become free once they serve them."""


class Schedule(Protocol):
    """Holds admitted pairs until their step has come."""

    @property
    def window_pairs(self) -> int:
        """Pairs that belong to one version of the policy: what the gate counts in."""
        ...

    def open(self, indices: Sequence[int]) -> None:
        """Pairs with these plan indices are on their way."""
        ...

    def close(self, index: int) -> None:
        """This pair has ended without a label."""
        ...

    def add(self, item: LabeledPair) -> None:
        """An opened pair has its label."""
        ...

    def next(self) -> TrainingBatch | None:
        """The batch of the next step, once all of its pairs are labelled."""
        ...

    def introduced(self, step: int) -> int:
        """Pairs that steps 1 to ``step`` train on at least once."""
        ...

    def retired(self, step: int) -> int:
        """Pairs that steps 1 to ``step`` train on for the last time."""
        ...

    def served_version(self, step: int) -> int:
        """The version that generators serve while step ``step`` + 1 is trained, at the least."""
        ...


class _Pool:
    """Admitted pairs by plan index."""

    def __init__(self) -> None:
        # In order, so that looking for a batch touches a batch, however many are in flight.
        self._open: list[int] = []
        self._ready: dict[int, LabeledPair] = {}

    def open(self, indices: Sequence[int]) -> None:
        new = sorted(indices)
        follow = not self._open or not new or self._open[-1] < new[0]
        self._open += new
        if not follow:  # what an interrupted run had sampled comes before what it had only planned
            self._open.sort()

    def close(self, index: int) -> None:
        place = bisect.bisect_left(self._open, index)
        assert self._open[place] == index, f"pair {index} is not on its way"
        del self._open[place]

    def add(self, item: LabeledPair) -> None:
        self._ready[item.pair.plan.index] = item

    def first(self, end: int, *, start: int = 0, key: Callable[[int], int] | None = None) -> list[LabeledPair] | None:
        """Pairs ``start`` to ``end`` in the order of ``key``, or of plan; None unless all are there and labelled."""
        if len(self._open) < end or (key is not None and len(self._ready) < len(self._open)):
            return None
        wanted = (self._open[:end] if key is None else heapq.nsmallest(end, self._open, key=key))[start:]
        if any(index not in self._ready for index in wanted):
            return None
        return [self._ready[index] for index in wanted]

    def identity(self, index: int) -> str:
        """Identity of a labelled pair."""
        return self._ready[index].pair_id

    def remove(self, items: Sequence[LabeledPair]) -> None:
        gone = {item.pair.plan.index for item in items}
        self._open = [index for index in self._open if index not in gone]
        for index in gone:
            del self._ready[index]


class OnlineSchedule:
    """Every pair once, strictly in plan order; every step is handed out.

    The order is what bounds the age of a pair: :class:`pilaf_ray.pipeline.gate.StalenessGate`.
    """

    def __init__(self, *, batch_pairs: int) -> None:
        self._batch_pairs = batch_pairs
        self._pool = _Pool()
        self.open, self.close, self.add = self._pool.open, self._pool.close, self._pool.add

    @property
    def window_pairs(self) -> int:
        """A version a batch."""
        return self._batch_pairs

    def next(self) -> TrainingBatch | None:
        """The next pairs in plan order, once all of them are labelled."""
        items = self._pool.first(self._batch_pairs)
        if items is None:
            return None
        self._pool.remove(items)
        return TrainingBatch(items=items, is_first_use=True, is_last_use=True, publishes=True, slots=len(items))

    def introduced(self, step: int) -> int:
        """A batch a step."""
        return step * self._batch_pairs

    def retired(self, step: int) -> int:
        """The same: every pair is used once."""
        return step * self._batch_pairs

    def served_version(self, step: int) -> int:
        """The step's own."""
        return step


class IterativeSchedule:
    """Rounds: a set of pairs from a frozen policy, then ``epochs`` passes over it, then the next round.

    Generators serve the policy of the round's start until its last step, so the set does not
    depend on when training begins: the first pass goes in plan order and starts as soon as its first
    batch is labelled. Later passes go in an order drawn from seed, pass and the pairs' identities.
    A pair stays LABELED until its last pass; so a round can be resumed at any step from the ledger
    and the step's number. The gate's window is a round: its slots are released at its end.

    Args:
        start_step: steps that were taken before; the pairs of the round under way are still to be opened,
            all but those that were trained on for the last time.
    """

    def __init__(self, *, batch_pairs: int, pairs_per_round: int, epochs: int, seed: int, start_step: int = 0) -> None:
        assert pairs_per_round % batch_pairs == 0, "a round is whole batches"
        self._batch_pairs = batch_pairs
        self._round_pairs = pairs_per_round
        self._epochs = epochs
        self._seed = seed
        self._step = start_step
        self._pool = _Pool()
        self.open, self.close, self.add = self._pool.open, self._pool.close, self._pool.add

    @property
    def window_pairs(self) -> int:
        """A version a round."""
        return self._round_pairs

    @property
    def _round_steps(self) -> int:
        return self._epochs * self._round_pairs // self._batch_pairs

    def next(self) -> TrainingBatch | None:
        """The batch at the next position of the round, once its pairs are labelled."""
        place = self._step % self._round_steps
        epoch, number = divmod(place, self._round_pairs // self._batch_pairs)
        is_last = epoch == self._epochs - 1
        # In the last pass, pairs that were used are gone.
        start = 0 if is_last else number * self._batch_pairs
        key = None if epoch == 0 else partial(self._shuffled, epoch)
        items = self._pool.first(start + self._batch_pairs, start=start, key=key)
        if items is None:
            return None
        if is_last:
            self._pool.remove(items)
        self._step += 1
        ends = place + 1 == self._round_steps
        return TrainingBatch(
            items=items,
            is_first_use=epoch == 0,
            is_last_use=is_last,
            publishes=ends,
            slots=self._round_pairs if ends else 0,
        )

    def _shuffled(self, epoch: int, index: int) -> int:
        return derive_seed(self._pool.identity(index), f"pass-{self._seed}-{epoch}")

    def introduced(self, step: int) -> int:
        """Whole rounds, and the batches of the first pass of the round under way."""
        rounds, place = divmod(step, self._round_steps)
        return rounds * self._round_pairs + min(place * self._batch_pairs, self._round_pairs)

    def retired(self, step: int) -> int:
        """Whole rounds, and the batches of the last pass of the round under way."""
        rounds, place = divmod(step, self._round_steps)
        before_last = (self._epochs - 1) * self._round_pairs // self._batch_pairs
        return rounds * self._round_pairs + max(0, place - before_last) * self._batch_pairs

    def served_version(self, step: int) -> int:
        """The step at which the round under way began."""
        return step - step % self._round_steps
