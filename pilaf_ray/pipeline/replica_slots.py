"""The places of a pool's replicas."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pilaf_ray.pipeline.departure import Departure
from pilaf_ray.pipeline.supervision import CircuitBreaker

W = TypeVar("W")


@dataclass(eq=False, slots=True)
class Slot(Generic[W]):
    """The place of a replica; ``worker`` is None while it is being replaced."""

    number: int
    worker: W | None
    breaker: CircuitBreaker
    incarnation: int = 0
    gone: Departure = field(default_factory=Departure)
    load: "Counter[str]" = field(default_factory=Counter)
    calls: int = 0
    claimed: str | None = None
    """The suspect that has this replica to itself."""
    retired: bool = False
    """It is out of the pool and gets no more work."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last call has left a retired replica."""
