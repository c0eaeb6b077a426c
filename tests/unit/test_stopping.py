"""Requests to stop: by real signals, between two attempts, at a run's end, and given back to whom they were."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_controller import World, controller

from pilaf_ray import build
from pilaf_ray.config.loader import load_config
from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.errors import RoleLostError
from pilaf_ray.pipeline.controller import STOPPED
from pilaf_ray.pipeline.recovery import train_through_losses
from pilaf_ray.pipeline.stopping import StopRequestedError, StopRequests
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.run_guards import RunGuards
from pilaf_ray.run_restoring import RestoredRun
from pilaf_ray.store.records import UnfinishedWork
from pilaf_ray.training_run import TrainingRun

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


async def write(folder: Path) -> None:
    (folder / "weights").write_text("learned")


async def published(_step: int, _folder: Path) -> None: ...


async def forever() -> None:
    await asyncio.Event().wait()


class Losing:
    """Every attempt has a checkpoint of step 3 under way and loses its learner in step 4."""

    def __init__(self, folder: Path) -> None:
        self.store = CheckpointStore(folder, keep_last=2)
        self.events: list[str] = []
        self.attempts = 0

    async def train(self, _start: int) -> int:
        self.attempts += 1
        await self.store.write_behind(3, write, published=published)
        raise RoleLostError("rank 1 died in step 4")

    async def rebuild(self) -> int:
        signal.raise_signal(signal.SIGTERM)
        await forever()
        raise AssertionError("unreachable")

    async def pause(self, _seconds: float) -> None: ...

    async def go(self, stop: StopRequests) -> int | None:
        async with asyncio.timeout(10):
            return await train_through_losses(
                0,
                train=self.train,
                rebuild=self.rebuild,
                furthest_step=lambda: 3,
                policy=SupervisionPolicy(),
                stop=stop,
                report=lambda event, **_: self.events.append(event),
                sleep=self.pause,
            )


async def test_a_sigterm_while_the_learner_is_rebuilt_ends_the_run(tmp_path: Path) -> None:
    losing, said = Losing(tmp_path), []
    stop = StopRequests(lambda: said.append("stopping"))
    with stop.heard():
        assert await losing.go(stop) is None, "the rebuilding, which would last for ever, is given up"
    await losing.store.finish()
    assert losing.store.latest() == (3, tmp_path / "step-000003")
    assert (losing.events, losing.attempts, said) == (["learner lost"], 1, ["stopping"])
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_so_does_one_in_the_pause_before_it_or_before_the_loss(tmp_path: Path) -> None:
    losing, stop = Losing(tmp_path), StopRequests()

    async def pause(_seconds: float) -> None:
        signal.raise_signal(signal.SIGTERM)
        await forever()

    losing.pause = losing.rebuild = pause  # type: ignore[assignment, method-assign]
    with stop.heard():
        assert await losing.go(stop) is None
    assert await losing.go(stop) is None
    assert losing.attempts == 2


async def test_work_that_is_done_first_counts() -> None:
    stop = StopRequests()

    async def seven() -> int:
        return 7

    async def broken() -> int:
        raise RoleLostError("no memory")

    assert await stop.unless_requested(seven) == 7
    with pytest.raises(RoleLostError, match="no memory"):
        await stop.unless_requested(broken)
    stop.request()
    with pytest.raises(StopRequestedError):
        await stop.unless_requested(seven)


async def test_the_next_attempt_hears_of_a_request_that_came_before_it() -> None:
    world, stop = World(), StopRequests()
    stop.request()
    later = controller(world, [], staleness=1)
    with stop.passed_on(later.request_stop):
        assert (await later.run(), later.ended_by) == (0, STOPPED)
    assert world.trained == []


async def test_a_request_during_an_attempt_reaches_it_once() -> None:
    stop, calls = StopRequests(), list[str]()
    with stop.passed_on(lambda: calls.append("first")):
        stop.request()
        stop.request()
    with stop.passed_on(lambda: calls.append("second")):
        pass
    assert calls == ["first", "second"]


@contextmanager
def own_handlers() -> Iterator[list[str]]:
    """Yields what the handlers that were there before have heard."""
    heard: list[str] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda number, _: heard.append(signal.Signals(number).name)) for n in numbers]
    try:
        yield heard
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


async def handled() -> None:
    """The loop has read its signals, and what they set off at once is done."""
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, done.set)
    await done.wait()


async def test_a_second_ctrl_c_and_whatever_comes_after_the_end_is_not_ours() -> None:
    with own_handlers() as others:
        stop = StopRequests(repeat_seconds=0.0)
        with stop.heard():
            signal.raise_signal(signal.SIGINT)
            await handled()
            assert stop.requested and others == []
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            await handled()
            assert others == ["SIGINT"], "schedulers repeat their SIGTERM, people mean their second Ctrl-C"
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert others == ["SIGINT", "SIGINT", "SIGTERM"]


async def test_a_ctrl_c_that_is_passed_on_twice_is_one() -> None:
    with own_handlers() as others:
        stop = StopRequests(repeat_seconds=60.0)
        with stop.heard():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
                await handled()
        assert stop.requested and others == []
        await handled()
        signal.raise_signal(signal.SIGINT)
        assert others == ["SIGINT"]


class FakeCheckpoints:
    """Counts what is written; nothing may be read back."""

    def __init__(self, newest: int | None) -> None:
        self.newest = newest
        self.done: list[Any] = []
        self.store = SimpleNamespace(finish=self.finish, steps=lambda: [2, newest or 0])

    async def save(self, step: int, _writer: object, *, serving: int) -> None:
        self.done.append(("save", step, serving))

    async def finish(self) -> None:
        self.done.append("finish")


def training_run(tmp_path: Path, checkpoints: FakeCheckpoints) -> tuple[TrainingRun, list[str]]:
    """A run of which only the part that trains is there, and its events."""
    run, events = object.__new__(TrainingRun), list[str]()
    run._config = load_config(CONFIG, [])
    run._folder = SimpleNamespace(path=tmp_path)  # type: ignore[assignment]
    run._checkpoints = checkpoints  # type: ignore[assignment]
    run._guards, run._pause = RunGuards(run._config, tell=lambda _alarm: None), ""
    run._journal = SimpleNamespace(  # type: ignore[assignment]
        event=lambda name, **_: events.append(name), phase=lambda _text: None, training=nullcontext
    )
    return run, events


class FakeSide:
    save = None

    @asynccontextmanager
    async def running(self, _step: int) -> AsyncIterator[None]:
        yield


@pytest.mark.parametrize(
    ("newest", "done"), [(5, ["finish"]), (3, [("save", 5, 5), "finish"]), (None, [("save", 5, 5), "finish"])]
)
async def test_what_was_written_last_is_neither_written_nor_read_again(
    tmp_path: Path, newest: int | None, done: list[Any]
) -> None:
    checkpoints = FakeCheckpoints(newest)
    run, _ = training_run(tmp_path, checkpoints)

    async def five() -> int:
        return 5

    run._side = FakeSide()  # type: ignore[assignment]
    run._controller = lambda *_: SimpleNamespace(  # type: ignore[assignment, method-assign]
        run=five, request_stop=lambda: None, ended_by="run.max_steps"
    )
    begun = RestoredRun(step=2, unfinished=UnfinishedWork(), next_index=8)
    roles: Any = None
    assert await run._train(roles, roles, begun, StopRequests()) == 5
    assert (checkpoints.done, run.ended_by) == (done, "run.max_steps")


async def test_a_run_without_a_learner_ends_at_its_newest_checkpoint(tmp_path: Path) -> None:
    checkpoints = FakeCheckpoints(3)
    run, events = training_run(tmp_path, checkpoints)

    async def lost(*_: object) -> int:
        raise RoleLostError("rank 1 died in step 4")

    async def rebuild() -> None:
        signal.raise_signal(signal.SIGTERM)
        await forever()

    run._train = lost  # type: ignore[method-assign]
    roles: Any = SimpleNamespace(
        generators=SimpleNamespace(forget_weights=lambda: None, resize=None),
        learner=SimpleNamespace(rebuild=rebuild),
        reward=None,
    )
    begun = RestoredRun(step=0, unfinished=UnfinishedWork(), next_index=0)
    stop = StopRequests()
    assert build.supervision_policy(run._config).pause(1) == 0.0
    with stop.heard():
        async with asyncio.timeout(10):
            assert await run._train_through(roles, roles, begun, stop) == 3
    assert events == ["learner lost", "training ended"] and checkpoints.done == ["finish"]
