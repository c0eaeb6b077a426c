"""Staleness, bounded by construction: by pacing, never by throwing work away."""

import asyncio


class StalenessGate:
    """Admits a pair only while ``in_flight < (max_staleness_steps + 1) · batch_pairs``.

    A pair is in flight from its admission until it is trained on or has ended. Invariant:
    ``admitted == in_flight + released``.

    Why this bounds the age. Batches are taken strictly in plan order, and step k trains
    pairs under policy version k − 1. Let S be the bound, B the batch size, and suppose a
    pair is admitted while version v is published (steps 1..v are done and their slots
    released). At most (S + 1)·B pairs are in flight then, this one included and last in
    plan order, and each step retires B of them (a pair that ended retires earlier). So the
    pair is trained at step v + S + 1 at the latest, under version v + S. It was sampled
    under version v or newer, because its generation starts after its admission. Its age is
    at most S. Slots are released only after version v reached every generator: released
    earlier, a new pair could still be sampled under v − 1 and be trained at age S + 1.

    ``max_staleness_steps = 0`` is synchronous training.
    """

    def __init__(self, *, max_staleness_steps: int, batch_pairs: int) -> None:
        self._capacity = (max_staleness_steps + 1) * batch_pairs
        self._admitted = 0
        self._released = 0
        self._changed = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Pairs admitted and not yet trained or ended."""
        return self._admitted - self._released

    @property
    def free(self) -> int:
        """Pairs that may be admitted now."""
        return max(0, self._capacity - self.in_flight)

    def admit(self, pairs: int) -> None:
        """Take slots; the caller has seen that they are free (or resumes older work)."""
        self._admitted += pairs

    def release(self, pairs: int) -> None:
        """Give slots back: the pairs were trained on, or ended."""
        assert self._released + pairs <= self._admitted, "more pairs released than admitted"
        self._released += pairs
        self._changed.set()

    async def wait_for_slot(self) -> int:
        """Wait until at least one slot is free; returns how many are."""
        while self.free == 0:
            self._changed.clear()
            await self._changed.wait()
        return self.free
