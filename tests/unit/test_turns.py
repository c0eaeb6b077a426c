"""Turns on one device: never two at once, nobody waits for ever, a holder that dies loses its turn."""

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilaf_ray.errors import RoleLostError
from pilaf_ray.pipeline.turns import TurnTaking

ROLES = ("generator", "learner", "reference")


@dataclass
class Device:
    """What is on it, kept by hand; complains where two are."""

    turns: TurnTaking
    awake: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)

    def start(self, role: str) -> None:
        """In a turn of its own."""
        self.dead.discard(role)
        self._wake(role)
        self.turns.join(role, rest=lambda: self.rest(role), resume=lambda: self.resume(role))

    def die(self, role: str) -> None:
        self.dead.add(role)
        self.awake.discard(role)

    async def rest(self, role: str) -> None:
        await asyncio.sleep(0)
        if role in self.dead:
            raise RoleLostError(f"{role} has died")
        self.log.append(f"{role} rests")
        self.awake.remove(role)

    async def resume(self, role: str) -> None:
        assert not self.awake, f"{role} comes while {self.awake} are there"
        await asyncio.sleep(0)
        if role in self.dead:
            raise RoleLostError(f"{role} has died")
        self._wake(role)

    def use(self, role: str) -> None:
        assert self.awake <= {role}, f"{role} computes beside {self.awake}"
        assert role in self.awake or role in self.dead, f"{role} computes while it is away"

    def _wake(self, role: str) -> None:
        assert not self.awake - {role}, f"{role} comes while {self.awake} are there"
        self.log.append(f"{role} comes")
        self.awake.add(role)


async def started(*roles: str) -> Device:
    device = Device(TurnTaking())
    for role in roles:
        async with device.turns.turn(role):
            device.start(role)
    return device


async def settle() -> None:
    """Let every task go as far as it can: what is handed over here takes a few turns of the loop."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_last_user_leaves_before_the_next_role_comes() -> None:
    device = await started("generator", "learner")
    turns, entered = device.turns, []
    gates = {name: asyncio.Event() for name in ("first", "second")}

    async def generate(name: str) -> None:
        async with turns.turn("generator"):
            entered.append(name)
            await gates[name].wait()
            device.use("generator")

    async def train() -> None:
        async with turns.turn("learner"):
            entered.append("step")
            device.use("learner")

    tasks = [asyncio.create_task(generate("first"))]
    await settle()
    tasks += [asyncio.create_task(train()), asyncio.create_task(generate("second"))]
    await settle()
    assert entered == ["first"], "the second request stands behind the step"
    assert device.awake == {"generator"}
    gates["second"].set()
    gates["first"].set()
    await asyncio.gather(*tasks)
    assert entered == ["first", "step", "second"]
    assert device.log[-6:] == [
        *("learner rests", "generator comes"),
        *("generator rests", "learner comes"),
        *("learner rests", "generator comes"),
    ]
    assert turns.holder == "generator"


async def test_nobody_moves_without_another_who_asks() -> None:
    device = await started("generator", "learner")
    before, changes = list(device.log), device.turns.changes
    for _ in range(3):
        async with device.turns.turn("learner"):
            device.use("learner")
    assert (device.log, device.turns.changes) == (before, changes)


async def test_what_is_part_of_a_turn_enters_at_once_and_a_call_of_its_own_does_not() -> None:
    device = await started("generator", "learner")
    turns, order = device.turns, []

    async def generate() -> None:
        async with turns.turn("generator"):
            order.append("request")

    async with turns.turn("learner"):
        waiting = asyncio.create_task(generate())
        await settle()
        async with turns.within("learner"):
            order.append("push")
        await settle()
    await waiting
    assert order == ["push", "request"]
    async with turns.within("learner"):
        device.use("learner")


async def test_a_holder_that_died_is_in_nobodys_way() -> None:
    device = await started("generator", "learner")
    turns = device.turns
    device.die("learner")
    async with turns.turn("generator"):
        device.use("generator")
    # Its own calls say that it is gone; here they would.
    async with turns.turn("learner"):
        assert not device.awake
    turns.lost("learner")
    async with turns.turn("learner"):
        device.start("learner")
        device.use("learner")
    async with turns.turn("generator"):
        device.use("generator")


async def test_one_that_dies_at_rest_is_told_to_those_who_wait_for_it_only() -> None:
    device = await started("learner", "generator")
    device.die("learner")
    turns = device.turns

    async def ask(role: str) -> str:
        async with turns.turn(role):
            device.use(role)
        return role

    async with turns.turn("generator"):
        asked = [asyncio.create_task(ask(role)) for role in ("learner", "generator", "learner")]
        await settle()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(answer) for answer in found] == [RoleLostError, str, RoleLostError]


async def test_a_fault_of_ours_reaches_whoever_waits() -> None:
    device = await started("generator", "learner")

    async def broken() -> None:
        raise ZeroDivisionError("a bug")

    device.turns.join("learner", rest=broken, resume=broken)
    with pytest.raises(ZeroDivisionError):
        async with device.turns.turn("generator"):
            raise AssertionError("nobody came")


async def test_who_stops_waiting_is_not_waited_for() -> None:
    device = await started("generator", "learner")
    turns = device.turns

    async def train() -> None:
        async with turns.turn("learner"):
            raise AssertionError("it was cancelled")

    async with turns.turn("generator"):
        step = asyncio.create_task(train())
        await settle()
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)
    await settle()
    assert device.awake == {"generator"}, "nothing is moved for nobody"
    async with turns.turn("generator"):
        device.use("generator")
    await turns.close()


@dataclass(frozen=True)
class Move:
    """One asker: how long it waits first, how long it stays, and what happens meanwhile."""

    role: str
    after: int
    stays: int
    nested: bool
    dies: bool
    cancelled_after: int | None


MOVES = st.builds(
    Move,
    role=st.sampled_from(ROLES),
    after=st.integers(0, 6),
    stays=st.integers(0, 5),
    nested=st.booleans(),
    dies=st.sampled_from([False, False, False, True]),
    cancelled_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=14))
def test_never_two_at_once_and_nobody_waits_for_ever(moves: list[Move]) -> None:
    async def play() -> None:
        device = await started(*ROLES)
        turns = device.turns

        async def pause(times: int) -> None:
            for _ in range(times):
                await asyncio.sleep(0)

        async def stay(move: Move) -> None:
            device.use(move.role)
            await pause(move.stays)
            if move.dies:
                device.die(move.role)
            if move.role in device.dead:
                raise RoleLostError(f"{move.role} has died")
            device.use(move.role)
            if move.nested:
                async with turns.within(move.role):
                    device.use(move.role)

        async def restart(role: str) -> None:
            """As a lost group is: in a turn of its own."""
            turns.lost(role)
            async with turns.turn(role):
                if role in device.dead:
                    device.start(role)

        async def ask(move: Move) -> None:
            await pause(move.after)
            try:
                async with turns.turn(move.role):
                    await stay(move)
            except RoleLostError:
                await restart(move.role)

        async def cancel(task: "asyncio.Task[None]", after: int) -> None:
            await pause(after)
            task.cancel()

        asking = [asyncio.create_task(ask(move)) for move in moves]
        cancelling = [
            asyncio.create_task(cancel(task, move.cancelled_after))
            for task, move in zip(asking, moves, strict=True)
            if move.cancelled_after is not None
        ]
        # Nothing here takes time: what is not over soon waits for ever.
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*asking, *cancelling, return_exceptions=True)
        faults = [answer for answer in answers if isinstance(answer, Exception)]
        assert not faults, faults
        # Whatever happened, each role can still have its turn.
        for role in ROLES:
            try:
                async with turns.turn(role):
                    device.use(role)
            except RoleLostError:
                await restart(role)
                assert device.awake == {role}

    asyncio.run(play())
