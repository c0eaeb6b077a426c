"""Copying checkpoints away in the background: retried, warned about, and never the end of a run.

published ─▶ add ─▶ one at a time: gather, upload, point, prune
              └─ of those that wait, newer ones replace older ones that no round is sampled from
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential

from pilaf_ray.errors import MirrorError
from pilaf_ray.pipeline.supervision import Report

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 5


class MirrorPort(Protocol):
    """Where copies go; every method blocks and raises MirrorError."""

    def upload(self, step: int, files: Mapping[str, Path]) -> None:
        """Copy ``files`` by name, whole or not at all."""
        ...

    def point(self, step: int) -> None:
        """Name ``step`` as the newest."""
        ...

    def steps(self) -> list[int]:
        """Steps of which there is a copy."""
        ...

    def remove(self, step: int) -> None:
        """Forget a copy."""
        ...


class CheckpointMirror:
    """Copies checkpoints one after the other, beside the run.

    Args:
        gather: what belongs to a step, by name; called once a step, in a thread. Raises MirrorError.
        kept: (steps, newest, served) → those whose copies stay.
        done: told of a step that is done with, copied or not.
        seconds: deadline of each call to the location.
        pause: seconds before the second attempt; it doubles from there.
    """

    def __init__(
        self,
        port: MirrorPort,
        *,
        gather: Callable[[int], Mapping[str, Path]],
        kept: Callable[[Collection[int], int, int | None], set[int]],
        done: Callable[[int], None],
        report: Report,
        seconds: float,
        pause: float = 1.0,
    ) -> None:
        self._port, self._gather, self._kept, self._done = port, gather, kept, done
        self._report = report
        self._seconds, self._pause = seconds, pause
        self._waiting: dict[int, int | None] = {}
        self._copying: set[int] = set()
        self._working: asyncio.Task[None] | None = None

    @property
    def held(self) -> set[int]:
        """Steps whose checkpoints must not be removed yet."""
        return {*self._copying, *self._waiting}

    def add(self, step: int, *, serving: int | None = None) -> None:
        """Copy the checkpoint of ``step``; generators sample from that of ``serving`` until the round's end."""
        for older in [waiting for waiting in self._waiting if waiting != serving]:
            del self._waiting[older]
            self._report("checkpoint copy skipped", step=older, newer=step)
        self._waiting[step] = serving
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work(), name="checkpoint mirror")

    async def finish(self) -> None:
        """Return once everything is copied, or given up."""
        while self._working is not None and not self._working.done():
            await asyncio.shield(self._working)

    async def _work(self) -> None:
        while self._waiting:
            step = next(iter(self._waiting))
            self._copying = {step}
            serving = self._waiting.pop(step)
            try:
                await self._copy(step, serving)
            except MirrorError as error:
                logger.warning("checkpoint of step %d is not copied: %s", step, error)
                self._report("checkpoint not copied", step=step, cause=str(error))
            finally:
                self._copying = set()
                self._done(step)

    async def _copy(self, step: int, serving: int | None) -> None:
        # Once: whatever an attempt that hangs may still write later is what the others write.
        files = await self._beside(lambda: self._gather(step))

        def note(state: RetryCallState) -> None:
            assert state.outcome is not None
            cause = str(state.outcome.exception())
            self._report("checkpoint copy failed", step=step, attempt=state.attempt_number, cause=cause)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(MirrorError),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=self._pause, max=60.0),
            before_sleep=note,
            reraise=True,
        )
        await retrying(self._attempt, step, serving, files)
        self._report("checkpoint copied", step=step)

    async def _attempt(self, step: int, serving: int | None, files: Mapping[str, Path]) -> None:
        await self._beside(lambda: self._port.upload(step, files))
        # In calls of their own: an upload that is given up must not point or remove later.
        await self._beside(lambda: self._port.point(step))
        there = await self._beside(self._port.steps)
        for gone in sorted(set(there) - self._kept(there, step, serving)):
            await self._beside(partial(self._port.remove, gone))

    async def _beside(self, work: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(self._seconds):
                return await _in_daemon(work)
        except TimeoutError as error:
            raise MirrorError(f"no answer within checkpoint.mirror_seconds={self._seconds:g}") from error


async def _in_daemon(work: Callable[[], T]) -> T:
    """The result of ``work`` in a thread that nobody waits for at the end: a location may hang for ever."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            # Raised where the caller waits.
            failure = error
        # The loop is closed where the run ended without this answer.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, daemon=True, name="checkpoint mirror").start()
    return await done
