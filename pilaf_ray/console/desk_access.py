"""The labelling desk as the console's pages call it."""

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

from starlette.concurrency import run_in_threadpool

from pilaf_ray.store.desk import Backlog, LabelDesk, Progress
from pilaf_ray.store.records import LabelEvent, Lease

T = TypeVar("T")


class DeskAccess(Protocol):
    """What pages ask of the desk; each call returns once it is on disk. Raises LedgerError."""

    async def take(self, annotator: str) -> Lease | None:
        """The pair in the annotator's hands, or the next one."""
        ...

    async def renew(self, lease_id: int, annotator: str) -> Lease:
        """A new deadline."""
        ...

    async def answer(
        self, lease_id: int, pair_id: str, annotator: str, *, probability: float | None, details: str,
        reason: str | None, skip: bool,
    ) -> LabelEvent:  # fmt: skip
        """Keep an answer or a skip."""
        ...

    async def undo(self, annotator: str) -> LabelEvent | None:
        """Take the newest answer back."""
        ...

    async def requeue(self, annotator: str) -> int:
        """Take back every answer that is not used yet."""
        ...

    async def history(self) -> list[LabelEvent]:
        """The newest events by people, oldest first."""
        ...

    async def progress(self, annotator: str) -> Progress:
        """What one annotator has done."""
        ...

    async def backlog(self) -> Backlog:
        """How much waits for people."""
        ...


class LocalDesk:
    """A desk in this process, one call at a time: for labelling without a run."""

    def __init__(self, desk: LabelDesk) -> None:
        self._desk = desk
        self._lock = threading.Lock()

    async def take(self, annotator: str) -> Lease | None:
        return await self._call(lambda: self._desk.take(annotator))

    async def renew(self, lease_id: int, annotator: str) -> Lease:
        return await self._call(lambda: self._desk.renew(lease_id, annotator))

    async def answer(
        self, lease_id: int, pair_id: str, annotator: str, *, probability: float | None, details: str,
        reason: str | None, skip: bool,
    ) -> LabelEvent:  # fmt: skip
        return await self._call(
            lambda: self._desk.answer(
                lease_id, pair_id, annotator, probability=probability, details=details, reason=reason, skip=skip
            )
        )

    async def undo(self, annotator: str) -> LabelEvent | None:
        return await self._call(lambda: self._desk.undo(annotator))

    async def requeue(self, annotator: str) -> int:
        return await self._call(lambda: self._desk.requeue(annotator))

    async def history(self) -> list[LabelEvent]:
        return await self._call(self._desk.history)

    async def progress(self, annotator: str) -> Progress:
        return await self._call(lambda: self._desk.progress(annotator))

    async def backlog(self) -> Backlog:
        return await self._call(self._desk.backlog)

    async def _call(self, action: Callable[[], T]) -> T:
        def guarded() -> T:
            with self._lock:
                return action()

        return await run_in_threadpool(guarded)
