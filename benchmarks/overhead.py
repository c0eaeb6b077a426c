"""What supervision and checkpoints cost a run: ``python -m benchmarks.overhead configs/tiny.yaml``.

One run, cut into blocks of steps that differ in one thing, in an order drawn anew for each cycle: nothing; heartbeats
of every role, many times as often as the configuration asks for, so that their cost shows; one checkpoint at the
beginning, written as a run does it; the same, and the run waits until it is published. What a heartbeat or a checkpoint
adds to a block is divided by how seldom it comes. Blocks of one cycle are compared with each other, so that what
else the machine does meanwhile falls on all alike.
"""

import asyncio
import json
import random
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.machine import machine
from pilaf_ray import build
from pilaf_ray.actors.calls import call
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.launch import Roles
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.evaluation.statistics import Interval, bootstrap_mean, mean
from pilaf_ray.observability.logs import setup_logging
from pilaf_ray.pipeline.controller import Controller
from pilaf_ray.pipeline.schedule import Schedule
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.run_folder import RunFolder, open_run_folder
from pilaf_ray.training_run import TrainingRun

NEVER = 1e6
"""Seconds between heartbeats of the run itself: those of the blocks are measured."""


class Arm(StrEnum):
    """What a block does beside training."""

    PLAIN = "plain"
    HEARTBEATS = "heartbeats"
    CHECKPOINT = "checkpoint"
    WAITED = "checkpoint, waited for"


class MeasuredRun(TrainingRun):
    """A run whose blocks of steps differ.

    Args:
        arms: one a block.
        steps: of a block.
        every: seconds between heartbeats in the blocks that have them.
    """

    def __init__(
        self, config: RunConfig, inputs: build.RunInputs, folder: RunFolder, console: Console, *,
        arms: list[Arm], steps: int, every: float,
    ) -> None:  # fmt: skip
        super().__init__(config, inputs, folder, console)
        self._arms, self._steps, self._every = arms, steps, every
        self._beating: asyncio.Task[None] | None = None
        self._began = 0.0
        self.seconds: list[float] = []
        """Of each block."""
        self.heartbeats = 0
        self.stood_still = 0.0
        """Seconds until the learner had written its files, of all checkpoints."""

    async def _after_step(self, report: StepReport, roles: Roles, schedule: Schedule, controller: Controller) -> None:
        """Between two blocks the clock stands: what the one before left under way is waited for."""
        self._journal.step(report)
        step = report.result.step
        if step % self._steps:
            return
        if self._began:
            self.seconds.append(time.monotonic() - self._began)
        await self._end_block()
        # The first block warms up and is nobody's.
        number = step // self._steps - 1
        if number < len(self._arms):
            self._began = time.monotonic()
            await self._begin_block(self._arms[number], step, roles, schedule)

    async def _begin_block(self, arm: Arm, step: int, roles: Roles, schedule: Schedule) -> None:
        if arm is Arm.HEARTBEATS:
            self._beating = asyncio.create_task(self._beat(roles))
        elif arm is not Arm.PLAIN:
            began = time.monotonic()
            await self._checkpoints.save(step, self._side.save, serving=schedule.served_version(step))
            self.stood_still += time.monotonic() - began
            if arm is Arm.WAITED:
                await self._checkpoints.store.finish()

    async def _end_block(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
            self._beating = None
        await self._checkpoints.store.finish()

    async def _beat(self, roles: Roles) -> None:
        """As the supervision of every role does it."""
        pools: tuple[Any, ...] = (roles.generators, roles.reference, roles.oracle, roles.store)
        groups = (roles.learner, roles.reward)
        actors = [actor for pool in pools for actor in pool._pool.living().values()]
        actors += [actor for group in groups if group is not None for actor in group._actors]
        while True:
            await asyncio.sleep(self._every)
            asked = [call(actor.heartbeat.remote(), role="a role", seconds=60) for actor in actors]
            await asyncio.gather(*asked)
            self.heartbeats += 1


def differences(seconds: list[float], arms: list[Arm], arm: Arm) -> Interval:
    """Mean of block − plain block of the same cycle, with its interval over cycles."""
    cycles = len(arms) // len(Arm)
    found = []
    for cycle in range(cycles):
        block = slice(cycle * len(Arm), (cycle + 1) * len(Arm))
        of = dict(zip(arms[block], seconds[block], strict=True))
        found.append(of[arm] - of[Arm.PLAIN])
    return bootstrap_mean(found)


def told(config: RunConfig, run: MeasuredRun, arms: list[Arm], steps: int, times: float) -> dict[str, Any]:
    """The figures."""
    plain = mean([second for second, arm in zip(run.seconds, arms, strict=True) if arm is Arm.PLAIN])

    def share(arm: Arm, divisor: float) -> list[float]:
        found = differences(run.seconds, arms, arm)
        return [round(100 * value / divisor, 3) for value in (found.value, found.low, found.high)]

    every = config.checkpoint.every_steps
    written = sum(arm in (Arm.CHECKPOINT, Arm.WAITED) for arm in arms)
    return {
        "seconds_of_a_step": round(plain / steps, 4),
        "cycles": len(arms) // len(Arm),
        "steps_of_a_block": steps,
        "heartbeats": {
            "every_seconds": config.supervision.heartbeat_every_seconds,
            "times_as_often_here": times,
            "asked_of_each_role": run.heartbeats,
            "per_cent_of_a_step": share(Arm.HEARTBEATS, plain * times),
        },
        "checkpoints": {
            "every_steps": every,
            "per_cent_of_a_step": share(Arm.CHECKPOINT, plain / steps * every),
            "waited_for_per_cent_of_a_step": share(Arm.WAITED, plain / steps * every),
            "seconds_that_a_step_stood_still_for_one": round(run.stood_still / written, 4),
            "seconds_of_one": differences(run.seconds, arms, Arm.CHECKPOINT).value,
            "seconds_of_one_waited_for": differences(run.seconds, arms, Arm.WAITED).value,
        },
        "machine": machine(),
    }


def main(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. checkpoint.every_steps=20")] = None,
    cycles: Annotated[int, typer.Option(min=3, help="Each has one block of every kind.")] = 15,
    steps: Annotated[int, typer.Option(min=2, help="Of a block.")] = 10,
    times: Annotated[float, typer.Option(min=1.0, help="So many times as many heartbeats as configured.")] = 20.0,
    seed: int = 0,
) -> None:
    """Print as JSON what heartbeats and checkpoints add to a step, in per cent with 95 % intervals."""
    draw = random.Random(seed)
    arms = [arm for _ in range(cycles) for arm in draw.sample(list(Arm), len(Arm))]
    words = [*(overrides or []), f"run.max_steps={steps * (len(arms) + 1)}"]
    settings = load_config(config, words)
    quiet = load_config(config, [*words, f"supervision.heartbeat_every_seconds={NEVER}"])
    inputs = build.build_inputs(quiet)
    path = Path(quiet.run.folder) / quiet.run.name
    with open_run_folder(path, config_json=quiet.model_dump_json(), resume=False) as folder:
        setup_logging("controller", folder.logs)
        with ray_cluster(address=quiet.resources.address, num_cpus=quiet.total_cpus):
            run = MeasuredRun(
                quiet, inputs, folder, Console(quiet=True), arms=arms, steps=steps,
                every=settings.supervision.heartbeat_every_seconds / times,
            )  # fmt: skip
            asyncio.run(run.run(resume=False))
    print(json.dumps(told(settings, run, arms, steps, times), indent=1))


if __name__ == "__main__":
    typer.run(main)
