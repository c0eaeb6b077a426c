"""What a run says of itself: steps, events, evaluations and alarms to those who keep or show them, and its report."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pilaf_ray.actors.prometheus import PrometheusSink
from pilaf_ray.config.limits import NO_STEP_LIMIT
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.evaluation.kept_evaluations import KeptEvaluations
from pilaf_ray.evaluation.report import (
    EvaluationResult,
    RunTotals,
    learner_seconds,
    sample_rows,
    summarize,
    write_report,
)
from pilaf_ray.evaluation.step_metrics import busy_metrics, step_metrics, total_costs
from pilaf_ray.observability.activity import Metered, RoleActivity
from pilaf_ray.observability.alerts import Webhook
from pilaf_ray.observability.busy import BusyShares
from pilaf_ray.observability.live_view import LiveView
from pilaf_ray.observability.run_status import kept_status
from pilaf_ray.observability.sinks import EventLog, JsonlSink
from pilaf_ray.observability.spans import Spans
from pilaf_ray.observability.tensorboard_sink import FOLDER, TensorBoardSink
from pilaf_ray.observability.wandb_sink import WandbSink
from pilaf_ray.pipeline.guards import Alarm, StepClock
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.store.records import ENDED, LedgerCounts
from pilaf_ray.types import PairState, RoleUsage

LOOK_SECONDS = 2.0
"""Between two looks whether steps still come."""


class RunJournal:
    """The run folder's records, the terminal, wandb, TensorBoard, Prometheus and the webhook, behind one face.

    Made while Ray is connected: Prometheus is reached through it.

    Args:
        roles: the roles that compute, by name, as they are now; none before they have started.
        others: the roles that do not, in the same way.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        console: Console,
        *,
        roles: Callable[[], Mapping[str, Metered]],
        others: Callable[[], Mapping[str, Metered]],
    ) -> None:
        self._config = config
        self._folder = folder
        self._started = time.monotonic()
        folder.metrics.touch()
        self._metrics = JsonlSink(folder.metrics)
        self._events = EventLog(folder.events)
        self.event = self._events.record
        """Write a line of ``events.jsonl``: its name, and details as keywords."""
        self._wandb = WandbSink(
            project=config.logging.wandb_project,
            run_id=config.run.name,
            mode=config.logging.wandb,
            folder=folder.path,
            config=config.model_dump(),
        )
        self._tensorboard = TensorBoardSink(folder.path / FOLDER) if config.logging.tensorboard else None
        self._prometheus = PrometheusSink(config.run.name, folder.path.parent) if config.logging.prometheus else None
        self._webhook = Webhook(config.guards.webhook, run=config.run.name)
        self._steps = StepClock(config.guards.no_step_minutes)
        self.evaluations = KeptEvaluations(folder.path / "evaluations")
        self.spans = Spans()
        self._activity = RoleActivity(roles, others=others)
        self._shares = BusyShares(self._activity.busy)
        self._training_seconds = 0.0
        self._utilization: dict[str, float] = {}
        self._view = LiveView(
            console=console,
            name=config.run.name,
            max_steps=config.step_limit[0] if config.step_limit[0] < NO_STEP_LIMIT else None,
            max_staleness_steps=config.max_age_steps,
            roles=self._activity.lines,
        )

    @property
    def seconds(self) -> float:
        """Since the journal was opened."""
        return time.monotonic() - self._started

    @asynccontextmanager
    async def kept_status(self) -> AsyncIterator[None]:
        """Keep the status file while the block runs; Prometheus is told of the run no longer than that."""
        looking = asyncio.create_task(self._look_for_steps(), name="alarm without steps")
        try:
            async with kept_status(
                self._folder.path, phase=lambda: self._view.current_phase, roles=self._activity.states
            ):
                yield
        finally:
            looking.cancel()
            if self._prometheus is not None:
                self._prometheus.close()

    async def _look_for_steps(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            alarm = self._steps.look()
            if alarm is not None:
                self.alarm(alarm)

    def on_terminal(self) -> AbstractContextManager[object]:
        """Show the run on the terminal while the block runs."""
        return self._view

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the enclosed work as training, and the roles' share in it."""
        self._activity.begin()
        self._steps.begin()
        with self.spans.measure("training"):
            yield
        self._steps.end()
        self._training_seconds, self._utilization = self._activity.seconds, self._activity.utilization()

    def begin_steps(self) -> None:
        """Busy shares of the next step count from now on."""
        self._shares = BusyShares(self._activity.busy)

    def phase(self, text: str) -> None:
        """Say what the run as a whole does now."""
        self._view.phase(text)

    def step(self, report: StepReport) -> dict[str, Any]:
        """Write a step's metrics everywhere; returns them."""
        if self._steps.stepped(report.result.step):
            self.phase("training")
        metrics = step_metrics(report) | busy_metrics(self._shares.since_last())
        self._metrics.write(metrics)
        self._wandb.write(metrics)
        if self._tensorboard is not None:
            self._tensorboard.write(metrics)
        if self._prometheus is not None:
            self._prometheus.write(metrics)
            self._prometheus.write_roles(self._activity.lines())
        self._view.step(metrics, pairs=len(report.batch))
        return metrics

    async def pairs(self, counts: Callable[[], Awaitable[LedgerCounts]]) -> None:
        """Ask for the ledger's ``counts`` and write them, where anybody wants them with each step."""
        if self._prometheus is not None:
            self._prometheus.write_counts((await counts()).by_state)

    def cut_after(self, step: int) -> None:
        """Forget the metrics of later steps: they will be done again."""
        self._metrics.cut_after(step)
        if self._tensorboard is not None:
            self._tensorboard.cut_after(step)

    def evaluation(self, result: EvaluationResult) -> None:
        """Keep a held-out evaluation."""
        self.evaluations.add(result)
        self._wandb.write_samples(result.step, sample_rows(result, self._config.evaluation.sample_prompts))
        self.event("evaluation", step=result.step, reward=sum(result.rewards) / len(result.rewards))

    async def checkpoint(self, step: int, path: Path, *, policy: Path) -> None:
        """Tell of a checkpoint that is on disk; ``policy`` is its model folder."""
        self.event("checkpoint", step=step, path=str(path))
        if self._config.logging.wandb_checkpoints:
            # wandb hashes and copies the files before it returns.
            await asyncio.to_thread(self._wandb.write_checkpoint, step, policy)

    def alarm(self, alarm: Alarm) -> None:
        """Tell people that a guard's limit was passed."""
        self.event("guard", **asdict(alarm))
        self.phase(f"{alarm.guard}: {alarm.message}")
        self._wandb.alert(alarm.guard, alarm.message)
        self._webhook.send(alarm)

    def report(self, counts: LedgerCounts, usages: Sequence[RoleUsage], *, steps: int, ended_by: str) -> str:
        """Write ``report/``; returns its text."""
        lines = [json.loads(line) for line in self._folder.metrics.read_text().splitlines()]
        memory: dict[str, float] = {}
        for usage in usages:
            role = usage.role.split("-")[0]
            memory[role] = memory.get(role, 0.0) + usage.peak_memory_mib
        totals = RunTotals(
            pairs=counts[PairState.TRAINED],
            labels=counts.labels,
            ended={state.value: counts[state] for state in ENDED},
            steps=steps,
            wall_seconds=self.seconds,
            training_seconds=self._training_seconds,
            max_age_steps=max((line["age/max"] for line in lines), default=0),
            utilization=self._utilization,
            peak_memory_mib=memory,
            seconds={**self.spans.seconds, **learner_seconds(lines)},
            costs=total_costs(lines),
            ended_by=ended_by,
        )
        results = self.evaluations.results
        summary: dict[str, Any] = summarize(results[0], results[-1], totals, beta=self._config.algorithm.beta)
        return write_report(
            self._folder.report,
            summary=summary,
            evaluations=results,
            metrics=lines,
            sample_prompts=self._config.evaluation.sample_prompts,
        )

    def close(self) -> None:
        """Hand over what wandb has not sent yet, and close TensorBoard's file."""
        self._wandb.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
