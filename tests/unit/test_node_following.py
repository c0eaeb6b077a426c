"""Generators follow nodes: the rule by hand and as a property, and what the follower does with it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pilaf_ray.config.elastic import ElasticSection
from pilaf_ray.errors import ClusterError, PilafError, RoleLostError
from pilaf_ray.pipeline.node_following import ClusterView, NodeChange, NodeFollower, node_change, room_for
from pilaf_ray.placement import Bundle, NodeCapacity

A, B, C = "node-a", "node-b", "node-c"


@pytest.mark.parametrize(
    ("view", "least", "most", "change"),
    [
        # All is well, and nobody has room.
        (ClusterView(nodes={0: A, 1: B}), 1, 4, NodeChange()),
        # A new node has room for three, two are wanted.
        (ClusterView(nodes={0: A, 1: B}, room=3), 1, 4, NodeChange(add=(2, 3))),
        # One of two nodes is drained: its generator leaves; nobody has room for another one.
        (ClusterView(nodes={0: A, 1: B}, leaving=frozenset({A})), 1, 2, NodeChange(retire=(0,))),
        # The only generator's node is drained: it stays until the one that is started for it is there ...
        (ClusterView(nodes={0: A}, leaving=frozenset({A}), room=1), 1, 1, NodeChange(add=(1,))),
        # ... while that loads ...
        (ClusterView(nodes={0: A, 1: None}, leaving=frozenset({A})), 1, 1, NodeChange()),
        # ... and leaves then.
        (ClusterView(nodes={0: A, 1: B}, leaving=frozenset({A})), 1, 1, NodeChange(retire=(0,))),
        # Lost with its node: given up; with no room elsewhere nothing comes for it.
        (
            ClusterView(nodes={0: A, 1: None}, adrift=frozenset({1}), reserved=frozenset({0, 1})),
            1,
            2,
            NodeChange(retire=(1,)),
        ),
        # One that is replaced on a living node is nobody's business here.
        (ClusterView(nodes={0: A, 1: None}), 1, 2, NodeChange()),
        # Of two that have to go one must stay: the one that still serves.
        (
            ClusterView(nodes={0: A, 1: None}, leaving=frozenset({A}), adrift=frozenset({1})),
            1,
            2,
            NodeChange(retire=(1,)),
        ),
        # The place of number 1 is back, and is taken before others; number 2 has a place that is not there.
        (
            ClusterView(nodes={0: A}, spare=(1,), reserved=frozenset({0, 1, 2}), room=5),
            1,
            3,
            NodeChange(add=(1, 3)),
        ),
    ],
)
def test_what_follows_from_a_view(view: ClusterView, least: int, most: int, change: NodeChange) -> None:
    assert node_change(view, least=least, most=most) == change


@given(
    places=st.dictionaries(st.integers(0, 9), st.sampled_from([A, B, C, None]), min_size=1),
    leaving=st.frozensets(st.sampled_from([A, B])),
    reserved=st.frozensets(st.integers(0, 12)),
    room=st.integers(0, 5),
    bounds=st.tuples(st.integers(1, 6), st.integers(0, 6)),
    data=st.data(),
)
def test_bounds_hold_and_nobody_is_started_twice(
    places: dict[int, str | None],
    leaving: frozenset[str],
    reserved: frozenset[int],
    room: int,
    bounds: tuple[int, int],
    data: st.DataObject,
) -> None:
    nowhere = [number for number, node in places.items() if node is None]
    adrift = data.draw(st.frozensets(st.sampled_from(nowhere))) if nowhere else frozenset()
    spare = tuple(sorted(reserved - set(places)))
    view = ClusterView(nodes=places, leaving=leaving, adrift=adrift, spare=spare, reserved=reserved, room=room)
    least, most = bounds[0], sum(bounds)
    change = node_change(view, least=least, most=most)
    drained = {n for n, node in places.items() if node in leaving}
    must_go = adrift | drained
    assert set(change.retire) <= must_go
    left = {n: node for n, node in places.items() if n not in change.retire}
    assert left, "somebody stays"
    serving = [sum(node is not None for node in some.values()) for some in (places, left)]
    assert serving[1] >= min(least, serving[0])
    if must_go - set(change.retire):
        assert len(left) == 1 or (not set(left) & adrift and serving[1] <= least), "nobody stays without need"
    assert not set(change.add) & set(places) and len(set(change.add)) == len(change.add)
    assert len(change.add) <= max(0, most - (len(places) - len(must_go)))
    assert len(set(change.add) - set(spare)) <= room


def test_room_is_counted_node_by_node() -> None:
    bundle = Bundle(cpus=2.0, gpus=1.0, memory_gib=0.0, labels=(("pool", "new"),), members=())
    nodes = [
        NodeCapacity(name=A, cpus=9.0, gpus=3.0, labels=(("pool", "new"),)),
        NodeCapacity(name=B, cpus=3.0, gpus=3.0, labels=(("pool", "new"),)),
        NodeCapacity(name=C, cpus=64.0, gpus=8.0),
    ]
    assert room_for(bundle, nodes) == 3 + 1


@dataclass
class FakePool:
    done: list[tuple[str, Any]] = field(default_factory=list)
    may_start: asyncio.Event = field(default_factory=asyncio.Event)

    async def add(self, numbers: Sequence[int | None]) -> None:
        self.done.append(("add", tuple(numbers)))
        await self.may_start.wait()

    async def remove(self, number: int | None = None) -> None:
        self.done.append(("remove", number))

    async def resize(self, replicas: int) -> int:
        self.done.append(("resize", replicas))
        return replicas


async def test_the_follower_goes_on_looking_while_newcomers_start_but_starts_none_twice() -> None:
    views = [
        ClusterView(nodes={0: A}, room=1),
        ClusterView(nodes={0: A, 1: None, 2: B}, leaving=frozenset({A}), room=1),
        ClusterView(nodes={1: B}, room=1),
    ]
    pool, events = FakePool(), list[str]()

    async def look() -> ClusterView:
        return views.pop(0)

    follower = NodeFollower(pool=pool, look=look, least=1, most=2, report=lambda event, **_: events.append(event))
    await follower.step()
    await asyncio.sleep(0)
    await follower.step()
    assert pool.done == [("add", (1,)), ("remove", 0)], "the newcomer is not waited for, and not started again"
    pool.may_start.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await follower.step()
    await asyncio.sleep(0)
    assert pool.done[2:] == [("add", (0,))]
    assert events == ["generators join", "generator leaves", "generators join"]


async def test_a_request_by_hand_moves_the_bound() -> None:
    pool = FakePool()

    async def look() -> ClusterView:
        return ClusterView(nodes={0: A}, room=9)

    follower = NodeFollower(pool=pool, look=look, least=3, most=4, report=lambda *_, **__: None)
    assert await follower.resize(2) == 2
    await follower.step()
    await asyncio.sleep(0)
    assert pool.done == [("resize", 2), ("add", (1,))] and follower.least == 2


class FailingPool(FakePool):
    """Every newcomer fails with ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def add(self, numbers: Sequence[int | None]) -> None:
        self.done.append(("add", tuple(numbers)))
        raise self.error


def follower_of(pool: FakePool, looks: list[ClusterView | PilafError], events: list[Any]) -> NodeFollower:
    """Each look gives the next of ``looks``; the last one is repeated."""

    async def look() -> ClusterView:
        found = looks.pop(0) if len(looks) > 1 else looks[0]
        if isinstance(found, PilafError):
            raise found
        return found

    async def sleep(_seconds: float) -> None:
        await asyncio.sleep(0)

    report = lambda event, **details: events.append((event, details.get("cause")))  # noqa: E731
    return NodeFollower(pool=pool, look=look, least=1, most=2, report=report, sleep=sleep)


async def test_a_cluster_that_does_not_answer_is_looked_at_again() -> None:
    pool, events = FakePool(), list[Any]()
    away = ClusterError("Ray does not answer")
    views = [away, away, RoleLostError("cut off"), ClusterView(nodes={0: A}, room=1)]
    async with asyncio.timeout(10), follower_of(pool, views, events).following():
        while not pool.done:
            await asyncio.sleep(0)
    assert pool.done == [("add", (1,))]
    assert events[:3] == [
        ("nodes not followed", "Ray does not answer"),
        ("nodes not followed", "cut off"),
        ("generators join", None),
    ]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_newcomers_that_fail_are_reported_and_tried_again() -> None:
    pool, events = FailingPool(ClusterError("no place")), list[Any]()
    async with asyncio.timeout(10), follower_of(pool, [ClusterView(nodes={0: A}, room=1)], events).following():
        while len(pool.done) < 2:
            await asyncio.sleep(0)
    assert events[:3] == [("generators join", None), ("nodes not followed", "no place"), ("generators join", None)]


async def test_a_bug_in_following_ends_the_run_at_once() -> None:
    pool = FailingPool(KeyError("a bug"))
    with pytest.raises(KeyError, match="a bug"):
        async with asyncio.timeout(10), follower_of(pool, [ClusterView(nodes={0: A}, room=1)], []).following():
            await asyncio.Event().wait()
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="least: 3 is more than most: 2"):
        ElasticSection(least=3, most=2)
