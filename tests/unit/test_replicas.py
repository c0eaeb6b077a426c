"""Replicas that die, hang and come back, written by hand: what is repeated, who is blamed, when it ends."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pilaf_ray.errors import GivenUpError, OracleError, PoisonPairError, RoleLostError
from pilaf_ray.pipeline import supervision
from pilaf_ray.pipeline.replicas import ReplicaPool
from pilaf_ray.pipeline.supervision import CircuitBreaker, SupervisionPolicy


class Replica:
    """Answers when told to; ``poison`` kills it."""

    def __init__(self, name: str, poison: frozenset[str]) -> None:
        self.name = name
        self.poison = poison
        self.dead = asyncio.Event()
        self.stopped = False
        self.hold: asyncio.Event | None = None
        self.seen: list[str] = []

    async def work(self, item: str) -> str:
        self.seen.append(item)
        if item in self.poison:
            # The death is noticed by everything that is under way.
            await asyncio.sleep(0)
            self.dead.set()
        waiting = [asyncio.ensure_future(self.dead.wait())]
        if self.hold is not None:
            waiting.append(asyncio.ensure_future(self.hold.wait()))
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiting:
            waiter.cancel()
        if self.dead.is_set():
            raise RoleLostError(f"{self.name} has died")
        return f"{item} by {self.name}"


class World:
    """Makes pools, counts replacements, and keeps a clock that only sleeping moves."""

    def __init__(self, *, poison: frozenset[str] = frozenset(), broken_starts: int = 0) -> None:
        self.poison = poison
        self.broken_starts = broken_starts
        self.made: list[Replica] = []
        self.ended: list[Replica] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.now = 0.0
        self.pauses: list[float] = []

    def new(self, number: int) -> Replica:
        replica = Replica(f"{number}.{sum(r.name.startswith(f'{number}.') for r in self.made)}", self.poison)
        self.made.append(replica)
        return replica

    async def replace(self, number: int) -> Replica:
        if self.broken_starts:
            self.broken_starts -= 1
            raise RoleLostError(f"no memory for {number}")
        return self.new(number)

    async def end(self, replica: Replica) -> None:
        self.ended.append(replica)
        replica.dead.set()

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def report(self, event: str, **details: Any) -> None:
        self.events.append((event, details))

    def pool(self, replicas: int, ping: Callable[[Replica], Any] | None = None, **policy: Any) -> ReplicaPool[Replica]:
        return ReplicaPool(
            "generator",
            [self.new(number) for number in range(replicas)],
            replace=self.replace,
            end=self.end,
            ping=ping,
            policy=SupervisionPolicy(**policy),
            report=self.report,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


def ask(pool: ReplicaPool[Replica], *items: str) -> "asyncio.Task[str]":
    async def work(replica: Replica, number: int) -> str:
        assert replica.name.startswith(f"{number}.")
        return await replica.work("+".join(items))

    return asyncio.ensure_future(pool.run(work, pairs=items))


@pytest.fixture(autouse=True)
async def in_time() -> AsyncIterator[None]:
    async with asyncio.timeout(10):
        yield


async def test_work_outside_the_pool_ends_with_its_replica() -> None:
    world = World()
    pool = world.pool(2)

    async def forever() -> None:
        await asyncio.Event().wait()

    async def quick() -> str:
        return "done"

    assert await pool.unless_lost(1, quick()) == "done"
    cut_off = asyncio.ensure_future(pool.unless_lost(1, forever()))
    await asyncio.sleep(0)
    pool.lose(1, RoleLostError("no sign of life"))
    with pytest.raises(RoleLostError, match="no sign of life"):
        await cut_off
    with pytest.raises(RoleLostError, match="generator 2 is not there"):
        await pool.unless_lost(2, forever())
    await pool.close()


async def test_work_of_a_dead_replica_is_done_by_the_others_and_a_replacement_takes_work_again() -> None:
    world = World()
    pool = world.pool(2)
    for replica in world.made:
        replica.hold = asyncio.Event()
    tasks = [ask(pool, name) for name in "abcd"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sorted(len(r.seen) for r in world.made) == [2, 2], "spread evenly"
    first, second = world.made
    first.dead.set()
    assert second.hold is not None
    second.hold.set()
    answers = await asyncio.gather(*tasks)
    assert [answer.split(" by ")[0] for answer in answers] == list("abcd")
    assert all("0.0" not in answer for answer in answers)
    assert world.ended == [first]
    assert [name for name, _ in world.events] == ["replica lost", "replica replaced"]
    assert world.events[0][1] == {"role": "generator", "replica": 0, "cause": "0.0 has died"}
    assert set(pool.living()) == {0, 1}
    await pool.close()


async def test_own_errors_arrive_as_themselves_and_kill_nobody() -> None:
    world = World()
    pool = world.pool(1)

    async def refuse(_replica: Replica, _number: int) -> None:
        raise OracleError("nonsense")

    with pytest.raises(OracleError, match="nonsense"):
        await pool.run(refuse, pairs=["a"])
    assert world.events == []


async def test_a_pair_that_kills_replicas_is_convicted_alone_and_its_neighbours_are_not() -> None:
    world = World(poison=frozenset({"bad"}))
    pool = world.pool(2, failures_in_a_row=9)
    tasks = [ask(pool, name) for name in ("one", "bad", "two", "three")]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], PoisonPairError)
    assert "pair bad" in str(results[1]) and "has died" in str(results[1])
    assert [str(r).split(" by ")[0] for r in (results[0], results[2], results[3])] == ["one", "two", "three"]
    deaths = sum(name == "replica lost" for name, _ in world.events)
    assert 2 <= deaths <= 3
    assert (await ask(pool, "later")).startswith("later by ")
    await pool.close()


async def test_random_deaths_make_suspects_which_run_alone_and_are_cleared() -> None:
    world = World()
    pool = world.pool(1, failures_in_a_row=99)
    tasks = [ask(pool, name) for name in ("a", "b")]
    for _ in range(2):
        replica = world.made[-1]
        replica.hold = asyncio.Event()
        while len(replica.seen) < 2:
            await asyncio.sleep(0)
            replica.hold.clear()
        deaths = len(world.made)
        replica.dead.set()
        while len(world.made) == deaths:
            await asyncio.sleep(0)
        world.made[-1].hold = asyncio.Event()
    last = world.made[-1]
    assert last.hold is not None
    while not last.seen:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(last.seen) == 1, "a suspect has the replica to itself"
    last.hold.set()
    assert [answer[0] for answer in await asyncio.gather(*tasks)] == ["a", "b"]
    await pool.close()


async def test_several_pairs_in_one_call_are_sent_back_to_be_tried_singly() -> None:
    world = World(poison=frozenset({"a+b", "b"}))
    pool = world.pool(1, failures_in_a_row=9)
    with pytest.raises(PoisonPairError, match="one of 2 pairs"):
        await ask(pool, "a", "b")
    assert (await ask(pool, "a")).startswith("a by ")
    with pytest.raises(PoisonPairError, match="pair b: 3 generator replicas"):
        await ask(pool, "b")
    await pool.close()


async def test_failures_in_a_row_stop_the_run_with_the_first_cause_after_growing_pauses() -> None:
    world = World(broken_starts=99)
    pool = world.pool(1, failures_in_a_row=4, first_pause=1.0)
    world.made[0].dead.set()
    with pytest.raises(GivenUpError, match=r"generator 0 failed 4 times in a row; first: 0\.0 has died"):
        await ask(pool, "a")
    assert world.pauses == [0.0, 1.0, 2.0]
    assert [name for name, _ in world.events] == ["replica lost", *["replacement failed"] * 3, "given up"]
    with pytest.raises(GivenUpError):
        await ask(pool, "b")


async def test_a_fault_in_replacing_itself_leaves_nobody_waiting() -> None:
    class Broken(World):
        async def replace(self, number: int) -> Replica:
            raise KeyError("a mistake of ours")

    world = Broken()
    pool = world.pool(1)
    world.made[0].dead.set()
    with pytest.raises(GivenUpError, match=r"supervision failed \(KeyError"):
        await ask(pool, "a")


async def test_a_success_closes_the_breaker() -> None:
    world = World(broken_starts=2)
    pool = world.pool(1, failures_in_a_row=4)
    for round_ in range(3):
        world.made[-1].dead.set()
        assert (await ask(pool, f"{round_}")).startswith(f"{round_} by ")
        world.broken_starts = 2
    await pool.close()


async def test_a_controller_that_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its timers ring late, before it has read the answers that came meanwhile."""
    monkeypatch.setattr(supervision, "LATE_SECONDS", 0.05)
    world, asked = World(), 0

    async def ping(_replica: Replica) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            time.sleep(0.2)  # nothing of this process runs
            await asyncio.Event().wait()

    pool = world.pool(1, ping=ping, heartbeat_seconds=0.02)
    while asked < 3:
        await asyncio.sleep(0)
    assert not world.events
    await pool.close()


async def test_a_stopped_replica_is_found_by_its_heartbeat_and_a_slow_one_is_not() -> None:
    world = World()

    async def ping(replica: Replica) -> None:
        if replica.stopped:
            await asyncio.Event().wait()

    pool = world.pool(2, ping=ping, heartbeat_seconds=0.02)
    stopped, slow = world.made
    for replica in world.made:
        replica.hold = asyncio.Event()
    tasks = [ask(pool, name) for name in "ab"]
    while not (stopped.seen and slow.seen):
        await asyncio.sleep(0)
    stopped.stopped = True
    while len(world.made) < 3:
        await asyncio.sleep(0)
    assert world.events[0][1]["cause"] == "generator 0 gave no sign of life for 0.02 s: stopped or stuck"
    slow.hold and slow.hold.set()
    answers = await asyncio.gather(*tasks)
    assert not any("0.0" in answer for answer in answers)
    assert any("1.0" in answer for answer in answers), "the slow one was left alone"
    await pool.close()


def test_policy_and_breaker() -> None:
    policy = SupervisionPolicy(first_pause=1.0, longest_pause=5.0)
    assert [policy.pause(n) for n in range(1, 7)] == [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]
    # docs/operations.md says how long a server of the ledger may be away: until the last of so many failures.
    patience = {limit: sum(SupervisionPolicy().pause(n) for n in range(1, limit)) for limit in (5, 12)}
    assert patience == {5: 7.0, 12: 303.0}
    breaker = CircuitBreaker("oracle 1", limit=2)
    breaker.failed("one")
    breaker.succeeded()
    breaker.failed("two")
    assert not breaker.is_open
    breaker.failed("three")
    assert breaker.is_open
    assert str(breaker.error()).startswith("oracle 1 failed 2 times in a row; first: two (")


async def test_a_newcomer_takes_work_once_it_is_ready_and_not_before() -> None:
    ready = asyncio.Event()

    class Slow(World):
        async def replace(self, number: int) -> Replica:
            await ready.wait()
            return self.new(number)

    world = Slow()
    pool = world.pool(1)
    growing = [asyncio.ensure_future(pool.grow()) for _ in range(2)]
    await asyncio.sleep(0)
    assert (set(pool.living()), len(pool)) == ({0}, 3)
    for replica in world.made:
        replica.hold = asyncio.Event()
    first = ask(pool, "a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    ready.set()
    assert sorted(await asyncio.gather(*growing)) == [1, 2]
    assert (await ask(pool, "b")).startswith("b by ") and world.made[0].seen == ["a"], "the busy one gets no more"
    assert [details["replica"] for name, details in world.events if name == "replica added"] == [1, 2]
    world.made[1].dead.set()
    assert (await ask(pool, "c")).startswith("c by "), "newcomers are replaced like the others"
    first.cancel()
    await pool.close()


async def test_a_newcomer_that_does_not_start_leaves_the_pool_as_it_was() -> None:
    world = World(broken_starts=1)
    pool = world.pool(1, failures_in_a_row=1)
    with pytest.raises(RoleLostError, match="no memory for 1"):
        await pool.grow()
    assert (len(pool), world.events) == (1, [])
    assert (await ask(pool, "a")).startswith("a by 0.0")
    assert await pool.grow() == 1
    await pool.close()


async def test_a_removed_replica_hands_its_work_back_before_it_is_ended_and_is_not_to_blame() -> None:
    world = World()
    pool = world.pool(2)
    for replica in world.made:
        replica.hold = asyncio.Event()
    tasks = [ask(pool, name) for name in "abcd"]
    for _ in range(3):
        await asyncio.sleep(0)
    assert sum(len(replica.seen) for replica in world.made) == 4
    kept, removed = world.made
    waiting: list[int] = []

    async def end(replica: Replica) -> None:
        waiting.append(len(kept.seen))
        await World.end(world, replica)

    pool._end = end
    assert await pool.shrink() == 1
    assert world.ended == [removed] and set(pool.living()) == {0}
    assert kept.hold is not None
    kept.hold.set()
    answers = await asyncio.gather(*tasks)
    assert [answer for answer in answers if "1.0" in answer] == []
    assert sorted(kept.seen) == ["a", "b", "c", "d"]
    assert world.events == [("replica removed", {"role": "generator", "replica": 1, "handed_back": 2})]
    assert pool._deaths == {}, "nobody is a suspect"
    pool.lose(1, RoleLostError("found unusable, too late"))
    assert len(world.events) == 1
    assert await pool.grow() == 1 and (await ask(pool, "e")).startswith("e by ")
    await pool.close()


async def test_a_replica_that_is_removed_while_it_is_replaced_does_not_come_back() -> None:
    starting, may_start = asyncio.Event(), asyncio.Event()

    class Slow(World):
        async def replace(self, number: int) -> Replica:
            starting.set()
            await may_start.wait()
            return self.new(number)

    world = Slow()
    pool = world.pool(2)
    pool.lose(1, RoleLostError("died"))
    await starting.wait()
    await pool.shrink()
    may_start.set()
    while len(world.ended) < 2:
        await asyncio.sleep(0)
    assert [replica.name for replica in world.ended] == ["1.0", "1.1"], "the replacement is ended, too"
    assert set(pool.living()) == {0} and (await ask(pool, "a")).startswith("a by 0.0")
    await pool.close()
