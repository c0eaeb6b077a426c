"""Slow or stuck: a role's own count, and what supervision makes of it, on one clock that only the test moves."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilaf_ray.errors import RoleLostError
from pilaf_ray.heartbeat import Heartbeat
from pilaf_ray.observability.progress import Progress
from pilaf_ray.pipeline.supervision import LATE_SECONDS, ProgressWatch, SupervisionPolicy

EVERY, LIMIT = 5.0, 300.0
POLICY = SupervisionPolicy(heartbeat_every=EVERY, heartbeat_seconds=60.0, stuck_seconds=LIMIT)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Supervised:
    """A role at work and who watches it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.progress = Progress(self.clock)
        self.watch = ProgressWatch(
            "generator 0", policy=POLICY, report=lambda event, **details: self.report(event, details), clock=self.clock
        )

    def report(self, event: str, details: dict[str, Any]) -> None:
        self.events.append((event, details))

    def used_to(self, name: str) -> None:
        with self.progress.work(name):
            pass

    def wait(self, seconds: float) -> bool:
        """Heartbeats for so long; whether the role is found stuck."""
        until, found = self.clock.now + seconds, False
        while self.clock.now < until and not found:
            self.clock.now = min(until, self.clock.now + EVERY)
            found = self.beat()
        return found

    def beat(self) -> bool:
        """One heartbeat; whether the role is found stuck."""
        try:
            self.watch.heard(self.progress.beat(1.0))
        except RoleLostError:
            return True
        return False

    def advances_and_beats(self, gaps: list[float], between: list[float], until: float) -> tuple[float, float | None]:
        """Advance after each of ``gaps``, ask after each of ``between``; (newest advance, when found stuck)."""
        moment = self.clock.now
        advances = [moment := moment + gap for gap in gaps]
        last, moment = advances[-1], self.clock.now
        found = None
        step = iter(between)
        while found is None and moment < last + until:
            moment += next(step, EVERY)
            while advances and advances[0] <= moment:
                self.clock.now = advances.pop(0)
                self.progress.advance()
            self.clock.now = moment
            found = moment if self.beat() else None
        return last, found


beats = st.lists(st.floats(0.01, EVERY), max_size=60)
within = st.floats(0.0, LIMIT * (1 - 1e-9))


@given(gaps=st.lists(within, min_size=1, max_size=8), between=beats)
def test_progress_within_the_limit_is_never_reported(gaps: list[float], between: list[float]) -> None:
    role = Supervised()
    role.used_to("generate")
    with role.progress.work("generate"):
        _, found = role.advances_and_beats(gaps, between, until=0.0)
    assert found is None and not role.events


@given(gaps=st.lists(within, min_size=1, max_size=4), between=beats)
def test_none_is_always_reported_within_the_limit_and_one_heartbeat(gaps: list[float], between: list[float]) -> None:
    role = Supervised()
    role.used_to("generate")
    with role.progress.work("generate"):
        last, found = role.advances_and_beats(gaps, between, until=LIMIT + 10 * EVERY)
    assert found is not None and LIMIT < found - last <= LIMIT + EVERY * (1 + 1e-9)
    [(event, details)] = role.events
    assert (event, details["role"], details["work"]) == ("stuck", "generator 0", "generate")
    assert details["idle_seconds"] == pytest.approx(found - last)


@given(seen=st.lists(st.floats(0.0, 600.0), max_size=8), seconds=st.floats(1.0, 600.0))
def test_a_calls_deadline_counts_from_the_newest_progress_that_was_seen(seen: list[float], seconds: float) -> None:
    clock = Clock()
    watch = ProgressWatch("learner", policy=POLICY, clock=clock)
    started, newest = clock.now, clock.now
    for count, gap in enumerate(seen, 1):
        clock.now = newest = newest + gap
        watch.heard(Heartbeat(memory_mib=1.0, advances=count))
    clock.now += 3.0
    watch.heard(Heartbeat(memory_mib=1.0, advances=len(seen)))
    assert watch.left(started, seconds=seconds) == pytest.approx(newest + seconds - clock.now)
    assert watch.left(clock.now, seconds=seconds) == pytest.approx(seconds), "a call that has just begun"


def test_what_says_nothing_is_no_sign_of_being_stuck() -> None:
    role = Supervised()
    assert not role.wait(9 * LIMIT), "no work"
    with role.progress.work("train_step"):
        assert not role.wait(9 * LIMIT), "kernels are compiled in the first step"
    assert not role.wait(9 * LIMIT), "no work again"
    with role.progress.work("train_step"):
        with role.progress.excused():
            assert not role.wait(9 * LIMIT), "new weights come in, with a deadline of their own"
        assert not role.wait(LIMIT), "counted from their end"
        with role.progress.work("save"):
            assert not role.wait(LIMIT), "the first of another kind is under way beside it"
        assert not role.wait(LIMIT)
        assert role.wait(EVERY)


def test_work_that_fails_or_is_given_up_is_no_progress() -> None:
    role = Supervised()
    role.used_to("generate")
    before = role.progress.beat(1.0).advances
    with role.progress.work("generate"):
        role.clock.now += LIMIT + 1
        with pytest.raises(ZeroDivisionError), role.progress.work("generate"):
            raise ZeroDivisionError
        beat = role.progress.beat(1.0)
    assert (beat.advances, beat.work, beat.idle_seconds) == (before, "generate", LIMIT + 1)


@pytest.mark.parametrize("advances", [False, True])
@pytest.mark.parametrize("frozen", [100.0, 5000.0])
def test_a_machine_that_slept_finds_nobody_stuck_and_still_finds_who_is(frozen: float, advances: bool) -> None:
    role = Supervised()
    role.used_to("score")
    with role.progress.work("score"):
        role.clock.now += EVERY
        assert not role.beat()
        role.clock.now += 1.0
        if advances:
            role.progress.advance()
        began = role.clock.now if advances else role.clock.now - 1.0 - EVERY
        role.clock.now += frozen
        assert frozen > EVERY + POLICY.heartbeat_seconds + LATE_SECONDS and not role.beat()
        while not role.beat():
            role.clock.now += EVERY
    awake = role.clock.now - began - frozen
    assert LIMIT - EVERY < awake <= LIMIT + 2 * EVERY, "when it slept is known to a heartbeat"


def test_the_loss_says_who_is_stuck_in_what_and_since_when() -> None:
    watch = ProgressWatch("policy learner rank 1", policy=SupervisionPolicy(stuck_seconds=90.0))
    with pytest.raises(RoleLostError) as caught:
        watch.heard(Heartbeat(memory_mib=1.0, work="train_step", advances=12, idle_seconds=94.61))
    assert str(caught.value) == (
        "policy learner rank 1 is stuck: it answers, but got no further with train_step for 94.6 s "
        "(supervision.stuck_seconds=90); see its log"
    )
