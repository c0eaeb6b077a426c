"""Generators that come and go with the nodes of a cluster.

What the cluster looks like ─▶ what is to change ─▶ generators are ended on nodes that leave and started where room is

The rule is arithmetic; looking at a cluster and starting generators is passed in.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from pilaf_ray.errors import PilafError
from pilaf_ray.pipeline.background import beside
from pilaf_ray.pipeline.supervision import Report
from pilaf_ray.placement import Bundle, NodeCapacity

SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterView:
    """Where generators are and where more could be."""

    nodes: Mapping[int, str | None]
    """The node of each generator, by number; None while it is being replaced or started."""
    leaving: frozenset[str] = frozenset()
    """Nodes that are drained, because they are preempted or taken away."""
    adrift: frozenset[int] = frozenset()
    """Generators that are gone with their node, whose place nobody has now."""
    spare: tuple[int, ...] = ()
    """Numbers without a generator whose place is still reserved, on a node that stays."""
    reserved: frozenset[int] = frozenset()
    """Numbers that have a place of their own, whether it is there now or not."""
    room: int = 0
    """How many more fit into what nodes that stay have free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeChange:
    """What is to be done now."""

    retire: tuple[int, ...] = ()
    add: tuple[int, ...] = ()


def node_change(view: ClusterView, *, least: int, most: int) -> NodeChange:
    """Generators on leaving nodes go, and new ones come where there is room.

    As long as it can be, ``least`` serve: one on a leaving node is kept until others do. Those that are gone with
    their node serve nobody and are not waited for, but one number, whoever it is, stays.
    """
    drained = [number for number, node in view.nodes.items() if node in view.leaving]
    serving = sum(node is not None for node in view.nodes.values())
    going = [*sorted(view.adrift), *sorted(drained)[: max(0, serving - least)]]
    retire = tuple(going[: len(view.nodes) - 1])
    staying = len(view.nodes) - len(view.adrift) - len(drained)
    free = (number for number in count() if number not in view.nodes and number not in view.reserved)
    wanted = max(0, most - staying)
    spare = [number for number in view.spare if number not in view.nodes][:wanted]
    fresh = [next(free) for _ in range(min(view.room, wanted - len(spare)))]
    return NodeChange(retire=retire, add=(*spare, *fresh))


def room_for(bundle: Bundle, nodes: Sequence[NodeCapacity]) -> int:
    """How many of ``bundle`` fit into what the nodes have free."""
    assert not bundle.is_empty, "what asks for nothing fits for ever"
    found = 0
    for node in nodes:
        left = node
        while left.holds(bundle):
            left, found = left.without(bundle), found + 1
    return found


class Pool(Protocol):
    """The generators."""

    async def add(self, numbers: Sequence[int | None]) -> None: ...
    async def remove(self, number: int | None = None) -> None: ...
    async def resize(self, replicas: int) -> int: ...


@dataclass(kw_only=True)
class NodeFollower:
    """Looks at the cluster now and again and changes the pool.

    Args:
        look: the cluster as it is.
        least, most: bounds of the number of generators.
        sleep: between two looks.
    """

    pool: Pool
    look: Callable[[], Awaitable[ClusterView]]
    least: int
    most: int
    report: Report
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _adding: "asyncio.Task[None] | None" = field(default=None, init=False)

    async def resize(self, replicas: int) -> int:
        """Somebody asks for so many: no more from now on, and no fewer where there is room."""
        self.most = max(replicas, 1)
        self.least = min(self.least, self.most)
        return await self.pool.resize(self.most)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow the cluster's nodes while the block runs; a look that fails is reported, with its cause."""
        try:
            async with beside(self._follow(), name="node following"):
                yield
        finally:
            if self._adding is not None:
                self._adding.cancel()
                await asyncio.gather(self._adding, return_exceptions=True)

    async def _follow(self) -> None:
        failed = ""
        while True:
            try:
                await self.step()
                failed = ""
            except PilafError as error:
                # Once for as long as it stays the same.
                if str(error) != failed:
                    failed = str(error)
                    self.report("nodes not followed", cause=failed)
            await self.sleep(SECONDS)

    async def step(self) -> None:
        """One look, and what follows from it; newcomers start in the background.

        Raises:
            PilafError: the cluster does not answer now, or newcomers of an earlier look did not start.
        """
        if self._adding is not None and self._adding.done():
            added, self._adding = self._adding, None
            added.result()
        view = await self.look()
        change = node_change(view, least=self.least, most=self.most)
        for number in change.retire:
            self.report("generator leaves", replica=number, node=view.nodes[number])
            await self.pool.remove(number)
        # A look while some are starting would count their room twice.
        if change.add and self._adding is None:
            self.report("generators join", replicas=list(change.add))
            self._adding = asyncio.create_task(self.pool.add(change.add), name="generators that join")
