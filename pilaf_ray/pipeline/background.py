"""Work beside other work: a fault of it is noticed when it happens, not when somebody asks."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], *, name: str) -> AsyncIterator[None]:
    """Do ``work`` while the block runs; where it raises, the block is cancelled and the error raised in its place."""
    loop = asyncio.get_running_loop()
    # Never by time. What it brings is cancelling the block, and only the block, in the way that asyncio means it.
    block = asyncio.timeout(None)
    task = asyncio.create_task(work, name=name)

    def ended(task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:
            block.reschedule(loop.time())

    try:
        async with block:
            task.add_done_callback(ended)
            try:
                yield
            finally:
                task.remove_done_callback(ended)
    except TimeoutError:
        if not block.expired():
            raise
    finally:
        task.cancel()
        (error,) = await asyncio.gather(task, return_exceptions=True)
    if error is not None and not isinstance(error, asyncio.CancelledError):
        raise error
