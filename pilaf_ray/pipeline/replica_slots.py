"""The places of a pool's replicas, and calls that end with their replica."""

import asyncio
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pilaf_ray.errors import RoleLostError
from pilaf_ray.pipeline.supervision import CircuitBreaker

W = TypeVar("W")
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Slot(Generic[W]):
    """The place of a replica; ``worker`` is None while it is being replaced."""

    number: int
    worker: W | None
    breaker: CircuitBreaker
    incarnation: int = 0
    gone: "asyncio.Future[RoleLostError]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    load: "Counter[str]" = field(default_factory=Counter)
    calls: int = 0
    claimed: str | None = None
    """The suspect that has this replica to itself."""
    retired: bool = False
    """It is out of the pool and gets no more work."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last call has left a retired replica."""


async def unless_gone(gone: "asyncio.Future[RoleLostError]", work: Awaitable[T]) -> T:
    """The result of ``work``; raises what ``gone`` holds if that comes first."""
    task = asyncio.ensure_future(work)
    waiting: set[asyncio.Future[Any]] = {task, gone}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise gone.result()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
