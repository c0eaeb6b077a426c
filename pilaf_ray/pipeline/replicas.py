"""Replicas of one role that are replaced when they are lost, and whose work is done elsewhere.

     run(work) ─▶ least loaded replica ─▶ answer
                     │ lost: died, deadline, no heartbeat
                     ├─▶ its work goes back to ``run``, which tries the next replica
                     └─▶ ended, replaced in its place, ready ─▶ takes work again

     grow() ─▶ one more, which takes work once it is ready
     shrink() ─▶ one less: its work goes back to ``run`` first, and nobody is blamed

A replica is anything; how it is called, ended and replaced is passed in.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from operator import attrgetter
from typing import Any, Generic, TypeVar

from pilaf_ray.errors import GivenUpError, PilafError, PoisonPairError, RoleLostError
from pilaf_ray.pipeline.departure import Departure
from pilaf_ray.pipeline.replica_slots import Slot
from pilaf_ray.pipeline.supervision import CircuitBreaker, Report, SupervisionPolicy, is_late, no_report

W = TypeVar("W")
T = TypeVar("T")

_CALLS = attrgetter("calls")
SUSPECT_DEATHS = 2
"""From so many deaths on a pair runs alone, so that the next one convicts it or clears it."""


class ReplicaPool(Generic[W]):
    """Spreads work over replicas; must be made inside a running event loop.

    What a lost replica was working on is repeated elsewhere. A pair that was under way at two
    deaths is a suspect and gets a replica to itself; if that one dies too (or died with nothing else
    to do), the pair is poison.

    Args:
        role: for messages and events, e.g. ``generator``.
        replace: starts a new replica number n and returns it once it may take work; raises PilafError.
        end: makes sure that a lost replica is gone; must not raise.
        ping: returns while the replica lives, however busy it is; None for no heartbeats.
    """

    def __init__(
        self,
        role: str,
        workers: Sequence[W],
        *,
        replace: Callable[[int], Awaitable[W]],
        end: Callable[[W], Awaitable[None]],
        ping: Callable[[W], Awaitable[object]] | None,
        policy: SupervisionPolicy,
        report: Report = no_report,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._role = role
        self._replace, self._end, self._ping = replace, end, ping
        self._policy, self._report = policy, report
        self._clock, self._sleep = clock, sleep
        self._slots = {n: Slot(n, worker, self._breaker(n)) for n, worker in enumerate(workers)}
        self._changed = asyncio.Event()
        self._deaths: Counter[str] = Counter()
        self._poison: dict[str, str] = {}
        self._given_up: GivenUpError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        for slot in self._slots.values():
            self._watch(slot)

    def living(self) -> dict[int, W]:
        """The replicas that take work now, by number."""
        return {slot.number: slot.worker for slot in self._slots.values() if slot.worker is not None}

    @property
    def numbers(self) -> list[int]:
        """All replicas, those that are being replaced included."""
        return sorted(self._slots)

    @property
    def lost(self) -> frozenset[int]:
        """Replicas that were lost and are being replaced."""
        return frozenset(n for n, slot in self._slots.items() if slot.worker is None and slot.gone.error is not None)

    def __len__(self) -> int:
        return len(self._slots)

    async def run(self, work: Callable[[W, int], Awaitable[T]], *, pairs: Sequence[str] = ()) -> T:
        """The answer of ``work(replica, number)``, from whichever replica lives to give it.

        Raises:
            PoisonPairError: replicas die of ``pairs``; several of them are to be tried one by one.
            GivenUpError: replicas cannot be replaced any more.
        """
        while True:
            slot = await self._take(pairs)
            incarnation, worker = slot.incarnation, slot.worker
            assert worker is not None
            with self._working(slot, pairs):
                try:
                    answer = await slot.gone.unless_gone(work(worker, slot.number))
                except RoleLostError as error:
                    self._count_lost(slot, incarnation, error)
                else:
                    if slot.incarnation == incarnation:
                        slot.breaker.succeeded()
                    return answer
            self._require_innocent(pairs)

    def lose(self, number: int, error: RoleLostError) -> None:
        """Give replica ``number`` up and replace it: somebody else found it unusable."""
        slot = self._slots.get(number)
        if slot is not None:
            self._count_lost(slot, slot.incarnation, error)

    async def unless_lost(self, number: int, work: Awaitable[T]) -> T:
        """The result of ``work``, which replica ``number`` does outside :meth:`run`.

        Raises:
            RoleLostError: the replica was given up first, or is not there.
        """
        slot = self._slots.get(number)
        gone = Departure() if slot is None else slot.gone
        if slot is None:
            gone.happen(RoleLostError(f"{self._role} {number} is not there"))
        return await gone.unless_gone(work)

    async def grow(self, number: int | None = None) -> int:
        """Start one more replica; returns its number once it takes work.

        Args:
            number: one that no replica has; the lowest when left out.

        Raises:
            PilafError: it does not start; the pool is as it was.
        """
        if number is None:
            number = next(free for free in count() if free not in self._slots)
        assert number not in self._slots, "the number is taken"
        slot: Slot[W] = Slot(number, None, self._breaker(number))
        self._slots[number] = slot
        started = self._clock()
        try:
            worker = await self._replace(number)
        except BaseException:
            del self._slots[number]
            raise
        # As in a replacement, nothing is awaited between readiness and here.
        slot.worker = worker
        self._watch(slot)
        self._changed.set()
        self._report("replica added", role=self._role, replica=number, seconds=self._clock() - started)
        return number

    async def shrink(self, number: int | None = None) -> int:
        """Take one replica (the last when left out) out and end it.

        What it was doing is done by the others, without blame.
        """
        assert len(self._slots) > 1, "somebody must do the work"
        slot = self._slots.pop(max(self._slots) if number is None else number)
        worker, slot.worker, slot.retired = slot.worker, None, True
        handed_back = slot.calls
        slot.gone.happen(RoleLostError(f"{self._role} {slot.number} is removed"))
        if slot.calls:
            await slot.left.wait()
        if worker is not None:
            await self._end(worker)
        self._report("replica removed", role=self._role, replica=slot.number, handed_back=handed_back)
        return slot.number

    async def close(self) -> None:
        """Stop watching and replacing; replicas are left as they are."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _breaker(self, number: int) -> CircuitBreaker:
        return CircuitBreaker(f"{self._role} {number}", limit=self._policy.failures_in_a_row)

    async def _take(self, pairs: Sequence[str]) -> Slot[W]:
        suspect = next((pair for pair in pairs if self._deaths[pair] >= SUSPECT_DEATHS), None)
        try:
            while True:
                if self._given_up is not None:
                    raise self._given_up
                slot = self._free(suspect)
                if slot is not None:
                    return slot
                self._changed.clear()
                await self._changed.wait()
        except BaseException:
            self._unclaim(suspect)
            raise

    def _free(self, suspect: str | None) -> Slot[W] | None:
        """The least loaded replica; one that works for nobody else where there is a suspect."""
        slot = min(self._open_slots(suspect), key=_CALLS, default=None)
        if suspect is not None and slot is not None:
            slot.claimed = suspect
            if set(slot.load) - {suspect}:
                return None
        return slot

    def _open_slots(self, suspect: str | None) -> list[Slot[W]]:
        """Those that ``suspect`` has claimed, or else those that nobody has."""
        slots = self._slots.values()
        claimed = () if suspect is None else [slot for slot in slots if slot.claimed == suspect and slot.worker]
        return list(claimed) or [slot for slot in slots if slot.claimed is None and slot.worker is not None]

    @contextmanager
    def _working(self, slot: Slot[W], pairs: Sequence[str]) -> Iterator[None]:
        load = slot.load
        load.update(pairs)
        slot.calls += 1
        try:
            yield
        finally:
            slot.calls -= 1
            if slot.retired and not slot.calls:
                slot.left.set()
            load.subtract(pairs)
            for pair in pairs:
                if load[pair] <= 0:
                    del load[pair]
            if slot.load is load and slot.claimed is not None and slot.claimed not in load:
                slot.claimed = None
            self._changed.set()

    def _unclaim(self, suspect: str | None) -> None:
        for slot in self._slots.values():
            if suspect is not None and slot.claimed == suspect and not slot.load[suspect]:
                slot.claimed = None
        self._changed.set()

    def _count_lost(self, slot: Slot[W], incarnation: int, error: RoleLostError) -> None:
        """The first to notice a death puts it on record and has the replica replaced."""
        if slot.incarnation != incarnation or slot.worker is None:
            return
        worker, slot.worker = slot.worker, None
        self._report("replica lost", role=self._role, replica=slot.number, cause=str(error))
        self._blame(set(slot.load), error)
        slot.breaker.failed(error)
        slot.gone.happen(error)
        self._start(self._replacing(slot, worker))

    def _blame(self, under_way: set[str], error: RoleLostError) -> None:
        self._deaths.update(under_way)
        for pair in under_way:
            if len(under_way) == 1 and self._deaths[pair] >= SUSPECT_DEATHS:
                self._poison[pair] = str(error)

    def _require_innocent(self, pairs: Sequence[str]) -> None:
        for pair in pairs:
            if pair in self._poison:
                raise PoisonPairError(
                    f"pair {pair}: {self._deaths[pair]} {self._role} replicas were lost over it ({self._poison[pair]})"
                )
        if len(pairs) > 1 and any(self._deaths[pair] >= SUSPECT_DEATHS for pair in pairs):
            raise PoisonPairError(f"{self._role} replicas were lost over one of {len(pairs)} pairs: try them singly")

    async def _replacing(self, slot: Slot[W], lost: W) -> None:
        started = self._clock()
        await self._end(lost)
        while not slot.breaker.is_open and not slot.retired:
            await self._sleep(self._policy.pause(slot.breaker.failures))
            try:
                worker = await self._replace(slot.number)
            except PilafError as error:
                self._report("replacement failed", role=self._role, replica=slot.number, cause=str(error))
                slot.breaker.failed(error)
                continue
            if slot.retired:
                await self._end(worker)
                return
            # Nothing is awaited between the newcomer's readiness and here: it misses no weights.
            slot.gone = Departure()
            # The lost one's calls count themselves out of its own counter.
            slot.load, slot.claimed = Counter(), None
            slot.worker, slot.incarnation = worker, slot.incarnation + 1
            self._changed.set()
            seconds = self._clock() - started
            self._report("replica replaced", role=self._role, replica=slot.number, seconds=seconds)
            return
        if slot.retired:
            return
        self._given_up = slot.breaker.error()
        self._report("given up", role=self._role, replica=slot.number, cause=str(self._given_up))
        self._changed.set()

    def _watch(self, slot: Slot[W]) -> None:
        if self._ping is not None:
            self._start(self._watching(slot, self._ping))

    async def _watching(self, slot: Slot[W], ping: Callable[[W], Awaitable[object]]) -> None:
        seconds = self._policy.heartbeat_seconds
        while not slot.retired:
            await self._sleep(self._policy.heartbeat_every)
            incarnation, worker = slot.incarnation, slot.worker
            if worker is None:
                continue
            asked = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(seconds):
                    await ping(worker)
            except TimeoutError:
                if is_late(asyncio.get_running_loop().time() - asked, deadline=seconds):
                    continue
                cause = f"{self._role} {slot.number} gave no sign of life for {seconds:g} s: stopped or stuck"
                self._count_lost(slot, incarnation, RoleLostError(cause))
            except RoleLostError as error:
                self._count_lost(slot, incarnation, error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A fault of our own in watching or replacing must not leave callers waiting for ever."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._given_up = GivenUpError(f"{self._role}: supervision failed ({type(error).__name__}: {error})")
            self._changed.set()
