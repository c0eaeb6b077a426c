"""A learner that is lost again and again: what is restored, when it is given up, and with which cause."""

from typing import Any

import pytest

from pilaf_ray.errors import GivenUpError, NonFiniteLossError, RoleLostError
from pilaf_ray.pipeline.recovery import train_through_losses
from pilaf_ray.pipeline.stopping import StopRequests
from pilaf_ray.pipeline.supervision import SupervisionPolicy


class Run:
    """Trains ten steps, with a checkpoint every third; dies as told."""

    def __init__(self, deaths: dict[int, int], failed_starts: int = 0) -> None:
        self.deaths = deaths
        self.failed_starts = failed_starts
        self.furthest = 0
        self.steps: list[int] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pauses: list[float] = []

    async def train(self, start: int) -> int:
        for step in range(start + 1, 11):
            if self.deaths.get(step, 0):
                self.deaths[step] -= 1
                raise RoleLostError(f"rank 1 died in step {step}, {self.deaths[step]} to come")
            self.steps.append(step)
            self.furthest = max(self.furthest, step)
        return 10

    async def rebuild(self) -> int:
        if self.failed_starts:
            self.failed_starts -= 1
            raise RoleLostError("no memory")
        return self.furthest // 3 * 3

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def go(self, limit: int = 3) -> int | None:
        return await train_through_losses(
            0,
            train=self.train,
            rebuild=self.rebuild,
            furthest_step=lambda: self.furthest,
            policy=SupervisionPolicy(failures_in_a_row=limit),
            stop=StopRequests(),
            report=lambda event, **details: self.events.append((event, details)),
            clock=lambda: 0.0,
            sleep=self.sleep,
        )


async def test_the_run_goes_on_from_the_checkpoint() -> None:
    run = Run({5: 1, 9: 1})
    assert await run.go() == 10
    assert run.steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 7, 8, 9, 10]
    assert [event for event, _ in run.events] == ["learner lost", "learner rebuilt"] * 2
    assert run.events[0][1] == {"step": 4, "cause": "rank 1 died in step 5, 0 to come"}
    assert run.pauses == [0.0, 0.0], "progress in between: not in a row"


async def test_a_step_that_always_kills_stops_the_run_though_others_are_repeated_between() -> None:
    run = Run({5: 99})
    with pytest.raises(GivenUpError, match="policy learner failed 3 times in a row; first: rank 1 died in step 5, 98"):
        await run.go()
    assert run.steps == [1, 2, 3, 4, 4, 4]
    assert run.pauses == [0.0, 1.0]
    event, details = run.events[-1]
    assert event == "given up" and details["cause"].startswith("policy learner failed 3 times in a row")


async def test_groups_that_do_not_start_count_too() -> None:
    run = Run({2: 1}, failed_starts=2)
    with pytest.raises(GivenUpError, match="first: rank 1 died in step 2"):
        await run.go()
    assert [details["cause"] for _, details in run.events][1:3] == ["no memory", "no memory"]
    patient = Run({2: 1}, failed_starts=2)
    assert await patient.go(limit=4) == 10


async def test_other_errors_are_not_survived() -> None:
    async def train(_start: int) -> int:
        raise NonFiniteLossError("nan")

    run = Run({})
    run.train = train  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError):
        await run.go()
