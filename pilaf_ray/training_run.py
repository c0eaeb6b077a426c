"""One run, from validated configuration to report."""

import asyncio
import json
import logging
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from pilaf_ray import build
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.launch import Roles
from pilaf_ray.actors.prometheus import PrometheusSink
from pilaf_ray.actors.weights import make_weight_sync
from pilaf_ray.build_samplers import build_pair_source
from pilaf_ray.config.limits import NO_STEP_LIMIT
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.errors import GuardError, LedgerError, RollbackError
from pilaf_ray.evaluation.evaluator import Evaluator
from pilaf_ray.evaluation.kept_evaluations import KeptEvaluations
from pilaf_ray.evaluation.report import (
    RunTotals,
    learner_seconds,
    sample_rows,
    summarize,
    write_report,
)
from pilaf_ray.evaluation.step_metrics import busy_metrics, spent_before, step_metrics, total_costs
from pilaf_ray.learner_side import LearnerSide
from pilaf_ray.observability.activity import RoleActivity
from pilaf_ray.observability.alerts import Webhook
from pilaf_ray.observability.busy import BusyShares
from pilaf_ray.observability.live_view import LiveView
from pilaf_ray.observability.logs import setup_logging
from pilaf_ray.observability.run_status import kept_status
from pilaf_ray.observability.sinks import EventLog, JsonlSink
from pilaf_ray.observability.spans import Spans
from pilaf_ray.observability.wandb_sink import WandbSink
from pilaf_ray.pipeline.controller import STOPPED, Controller
from pilaf_ray.pipeline.guards import Alarm, NumericGuards
from pilaf_ray.pipeline.pair_supply import UnfinishedWork
from pilaf_ray.pipeline.ports import LearnerPort, Ports
from pilaf_ray.pipeline.recovery import train_through_losses
from pilaf_ray.pipeline.reference_reuse import ReusingReference
from pilaf_ray.pipeline.schedule import Schedule
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.role_startup import start_roles
from pilaf_ray.run_folder import RunFolder, open_run_folder
from pilaf_ray.store.records import ENDED
from pilaf_ray.types import PairState, TokenPair

logger = logging.getLogger(__name__)

Restored = tuple[int, UnfinishedWork, int]
"""The last step that counts, what is left of later ones, and the index of the next new plan."""


def train(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Path:
    """Run ``config`` to its end, or until Ctrl-C; returns the run folder.

    Raises:
        PilafError: with one line that says what is wrong and how to mend it.
    """
    console = console or Console()
    for line in config.departures_from_theory:
        console.print(f"warning: {line}", markup=False)
    path = Path(config.run.folder) / config.run.name
    config = build.with_warm_start(config, saved=path / "config.json" if resume else None)
    inputs = build.build_inputs(config)
    with open_run_folder(path, config_json=config.model_dump_json(), resume=resume) as folder:
        setup_logging("controller", folder.logs)
        goes_on = True
        while goes_on:
            # With a reference that is reset, every round is a run of its own that resumes the one before.
            goes_on = _train_with_one_reference(config, inputs, folder, console, resume=resume)
            resume = True
    return path


def _train_with_one_reference(
    config: RunConfig, inputs: build.RunInputs, folder: RunFolder, console: Console, *, resume: bool
) -> bool:
    """Whether training goes on with another reference."""
    checkpoints = CheckpointStore(folder.checkpoints, keep_last=config.checkpoint.keep_last)
    found = checkpoints.latest() if resume else None
    config, until = build.with_round_reference(config, checkpoints, step=found[0] if found else 0)
    with ray_cluster(address=config.resources.address, num_cpus=config.total_cpus):
        run = TrainingRun(config, inputs, folder, console, until_step=until)
        asyncio.run(run.run(resume=resume))
    return run.ended_by == build.ROUND_ENDED


class TrainingRun:
    """Starts the roles, drives the controller, keeps the records."""

    def __init__(
        self,
        config: RunConfig,
        inputs: build.RunInputs,
        folder: RunFolder,
        console: Console,
        *,
        until_step: int | None = None,
    ) -> None:
        self._config = config
        self._until_step = until_step
        self.ended_by = ""
        """What ended training; empty until it has."""
        self._inputs = inputs
        self._folder = folder
        self._console = console
        self._started = time.monotonic()
        self._spans = Spans()
        folder.metrics.touch()
        self._metrics = JsonlSink(folder.metrics)
        self._events = EventLog(folder.events)
        self._wandb = WandbSink(
            project=config.logging.wandb_project,
            run_id=config.run.name,
            mode=config.logging.wandb,
            folder=folder.path,
            config=config.model_dump(),
        )
        self._checkpoints = CheckpointStore(
            folder.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            keep_every=config.checkpoint.keep_every,
            scores=lambda: self._evaluations.objectives(config.algorithm.beta),
        )
        self._evaluations = KeptEvaluations(folder.path / "evaluations")
        self._plans = build.PlanSource(prompts=inputs.train, sampler=inputs.sampler, seed=config.run.seed)
        self._roles: Roles | None = None
        self._activity = RoleActivity(lambda: self._roles.computing if self._roles else {})
        self._guards = NumericGuards(build.guard_rules(config))
        self._webhook = Webhook(config.guards.webhook, run=config.run.name)
        self._set_aside: list[tuple[str, str]] = []
        self._view = LiveView(
            console=console,
            name=config.run.name,
            max_steps=config.step_limit[0] if config.step_limit[0] < NO_STEP_LIMIT else None,
            max_staleness_steps=config.max_age_steps,
            roles=self._activity.lines,
        )

    async def run(self, *, resume: bool) -> None:
        """The whole run; on Ctrl-C the step under way is finished and saved."""
        async with kept_status(self._folder.path, phase=lambda: self._view.current_phase, roles=self._activity.lines):
            await self._run(resume=resume)

    async def _run(self, *, resume: bool) -> None:
        with self._view:
            self._events.record("run started", attempt=self._folder.attempt)
            self._view.phase("loading models")
            with self._spans.measure("start"):
                roles = await self._start_roles()
                start_step, unfinished, next_index = await self._restore(roles, resume=resume)
            evaluator = self._evaluator(roles)
            self._evaluations.load(until_step=start_step)
            if not self._evaluations.results:
                await self._evaluate(evaluator, start_step)
            finished = await self._train_through(roles, evaluator, (start_step, unfinished, next_index))
            if self.ended_by == STOPPED:
                self._view.phase(f"stopped after step {finished}; continue with --resume")
                return
            if self.ended_by == build.ROUND_ENDED:
                self._wandb.close()
                return
            if self._evaluations.results[-1].step != finished:
                await self._evaluate(evaluator, finished)
            text = await self._report(roles, finished)
            await roles.close()
        self._wandb.close()
        self._console.print(Markdown(text))
        self._console.print(f"report: {self._folder.report}", markup=False)

    async def _start_roles(self) -> Roles:
        self._roles = await start_roles(
            self._config, self._inputs, self._folder, report=self._events.record, console=self._console
        )
        self._events.record("roles ready", seconds=time.monotonic() - self._started)
        self._side = LearnerSide(self._config, self._inputs.train, self._roles, warn=self._warn)
        return self._roles

    def _warn(self, step: int, complaint: str) -> None:
        self._events.record("reward model unhealthy", step=step, complaint=complaint)
        self._view.phase(f"training; reward model unhealthy since step {step}: {complaint}")

    async def _restore(self, roles: Roles, *, resume: bool, rebuilt: bool = False) -> Restored:
        """Load the newest checkpoint and put the ledger back to it; generators of a rebuilt learner, too."""
        if not resume and await roles.store.next_plan_index():
            raise LedgerError(
                f"store.url: the database holds a run '{self._config.run.name}' already: choose another run.name"
            )
        await self._checkpoints.finish()
        found = await asyncio.to_thread(self._checkpoints.latest) if resume else None
        step = found[0] if found is not None else 0
        await roles.store.reset_after(step)
        for pair_id, reason in self._set_aside:
            await roles.store.reject(pair_id, reason)
        self._set_aside = []
        if found is not None:
            await self._side.load(found[1])
            self._events.record("checkpoint loaded", step=step)
        self._metrics.cut_after(step)
        self._sync = make_weight_sync(
            roles,
            probe_items=self._probe_items(),
            tolerance=build.probe_tolerance(self._config, self._inputs),
            deadline_seconds=self._config.weights.deadline_seconds,
            report=self._events.record,
        )
        await self._serve_again(roles, step, found, rebuilt=rebuilt)
        (await roles.store.counts()).check()
        planned, sampled, labeled = await roles.store.unfinished()
        work = UnfinishedWork(planned=planned, sampled=sampled, labeled=labeled)
        return step, work, await roles.store.next_plan_index()

    async def _serve_again(
        self, roles: Roles, step: int, found: tuple[int, Path] | None, *, rebuilt: bool = False
    ) -> None:
        """Give the generators the version that they served after ``step``: in a round, that of its beginning.

        Generators serve version 0 from their start on, and where it is a round's they never left it.
        """
        served = build.build_schedule(self._config, start_step=step).served_version(step)
        if served == 0 and not (rebuilt and step == 0):
            return
        if served < step:
            await roles.learner.load(self._checkpoints.at(served) / "learner")
        await self._sync.serve(served, await self._sync.push(served))
        if served < step and found is not None:
            await roles.learner.load(found[1] / "learner")

    def _probe_items(self) -> list[TokenPair]:
        """A fixed sequence of real prompt tokens, cut in two."""
        tokens = self._inputs.evaluation.prompts[0].token_ids
        half = max(1, len(tokens) // 2)
        return [(tokens[:half], tokens[half:])]

    def _evaluator(self, roles: Roles) -> Evaluator:
        return Evaluator(
            prompts=self._inputs.evaluation.prompts,
            generator=roles.generators,
            reference=roles.reference,
            oracle=roles.oracle,
            seed=self._config.run.seed,
        )

    async def _evaluate(self, evaluator: Evaluator, step: int) -> None:
        self._view.phase(f"evaluating step {step} on {len(self._inputs.evaluation.prompts)} held-out prompts")
        with self._spans.measure("evaluation"):
            result = await evaluator.evaluate(step)
        self._evaluations.add(result)
        self._wandb.write_samples(step, sample_rows(result, self._config.evaluation.sample_prompts))
        self._events.record("evaluation", step=step, reward=sum(result.rewards) / len(result.rewards))

    async def _train_through(self, roles: Roles, evaluator: Evaluator, work: Restored) -> int:
        """Train to the end, whatever the learner dies of on the way; returns the last step."""

        async def rebuild() -> Restored:
            self._view.phase("rebuilding the policy learner")
            roles.generators.forget_weights()
            await asyncio.gather(*(group.rebuild() for group in (roles.learner, roles.reward) if group is not None))
            self._side = LearnerSide(self._config, self._inputs.train, roles, warn=self._warn)
            restored = await self._restore(roles, resume=True, rebuilt=True)
            self._evaluations.load(until_step=restored[0])
            return restored

        self._furthest = work[0]
        self._activity.begin()
        with self._spans.measure("training"):
            finished = await train_through_losses(
                work,
                train=lambda work: self._train(roles, evaluator, *work),
                rebuild=rebuild,
                furthest_step=lambda: self._furthest,
                policy=build.supervision_policy(self._config),
                report=self._events.record,
            )
        self._training_seconds, self._utilization = self._activity.seconds, self._activity.utilization()
        return finished

    async def _train(
        self,
        roles: Roles,
        evaluator: Evaluator,
        start_step: int,
        unfinished: UnfinishedWork,
        next_index: int,
    ) -> int:
        schedule = build.build_schedule(self._config, start_step=start_step)
        async with self._side.running(start_step) as learner:
            controller = self._controller(roles, learner, evaluator, schedule, start_step, unfinished, next_index)

            def stop() -> None:
                self._view.phase("stopping: the step under way is finished and saved")
                controller.request_stop()

            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
            self._view.phase("training")
            finished = await controller.run()
        self.ended_by = controller.ended_by or STOPPED
        self._events.record("training ended", step=finished, by=self.ended_by)
        logger.info("training ended after step %d by %s", finished, self.ended_by)
        self._view.phase(f"training ended after step {finished}: {self.ended_by}")
        await self._checkpoints.finish()
        if finished > start_step and not self._checkpoints.has(finished):
            await self._save(finished, keep=schedule.served_version(finished))
        await self._checkpoints.finish()
        return finished

    def _controller(
        self,
        roles: Roles,
        learner: LearnerPort,
        evaluator: Evaluator,
        schedule: Schedule,
        start_step: int,
        unfinished: UnfinishedWork,
        next_index: int,
    ) -> Controller:
        config = self._config
        shares = BusyShares(self._activity.busy)
        prometheus = PrometheusSink(config.run.name) if config.logging.prometheus else None

        async def after_step(report: StepReport) -> None:
            metrics = step_metrics(report) | busy_metrics(shares.since_last())
            self._metrics.write(metrics)
            self._wandb.write(metrics)
            if prometheus is not None:
                prometheus.write(metrics)
                prometheus.write_roles(self._activity.lines())
                prometheus.write_counts((await roles.store.counts()).by_state)
            self._view.step(metrics, pairs=len(report.batch))
            step = report.result.step
            self._furthest = max(self._furthest, step)
            for alarm in self._guards.check(metrics):
                self._alarm(alarm, report, controller)
            # A round is resumed from the policy that samples it.
            ends_round = config.schedule.type == "iterative" and schedule.served_version(step) == step
            if step % config.checkpoint.every_steps == 0 or ends_round:
                await self._save(step, keep=schedule.served_version(step))

        async def after_sync(step: int) -> None:
            self._side.served()
            self._events.record("weights", version=step)
            every = config.evaluation.every_steps
            due = every and (step % every == 0 or config.schedule.type == "iterative")
            if due and step < config.step_limit[0]:
                await self._evaluate(evaluator, step)

        controller = Controller(
            ports=Ports(
                generator=roles.generators,
                reference=ReusingReference(roles.reference) if config.reference.reuse_sampled else roles.reference,
                oracle=roles.oracle,
                learner=learner,
                store=roles.store,
                weight_sync=self._sync,
            ),
            plan=self._plans.plan,
            next_index=next_index,
            schedule=schedule,
            budget=build.build_budget(config, spent=spent_before(self._folder.metrics), until_step=self._until_step),
            # A round is sampled from one policy: nothing is sampled ahead of its end.
            max_staleness_steps=0 if config.schedule.type == "iterative" else config.pipeline.max_staleness_steps,
            # People answer one pair at a time: none waits for its neighbours.
            label_batch_pairs=1 if config.oracle.asks_people else config.pipeline.label_batch_pairs,
            start_step=start_step,
            after_step=after_step,
            after_sync=after_sync,
            unfinished=unfinished,
            fail_fast=config.pipeline.fail_fast,
            pairs=build_pair_source(
                config, generator=roles.generators, reference=roles.reference, oracle=roles.oracle, reward=roles.reward
            ),
        )
        return controller

    def _alarm(self, alarm: Alarm, report: StepReport, controller: Controller) -> None:
        """Tell people, and do what the guard's policy says."""
        self._events.record("guard", **asdict(alarm))
        self._view.phase(f"{alarm.guard}: {alarm.message}")
        self._wandb.alert(alarm.guard, alarm.message)
        self._webhook.send(alarm)
        if alarm.policy == "pause":
            controller.request_stop()
        elif alarm.policy == "rollback":
            self._set_aside = [(item.pair_id, alarm.message) for item in report.batch]
            raise RollbackError(alarm.message)
        elif alarm.policy == "stop":
            raise GuardError(alarm.message)

    async def _save(self, step: int, *, keep: int) -> None:
        with self._spans.measure("checkpoint"):
            await self._checkpoints.write_behind(step, self._side.save, published=self._published, keep=keep)

    def _published(self, step: int, path: Path) -> None:
        self._events.record("checkpoint", step=step, path=str(path))

    async def _report(self, roles: Roles, finished: int) -> str:
        counts = (await roles.store.counts()).check()
        lines = [json.loads(line) for line in self._folder.metrics.read_text().splitlines()]
        usages = [usage for port in roles.computing.values() for usage in await port.usage()]
        memory: dict[str, float] = {}
        for usage in usages:
            role = usage.role.split("-")[0]
            memory[role] = memory.get(role, 0.0) + usage.peak_memory_mib
        totals = RunTotals(
            pairs=counts[PairState.TRAINED],
            labels=counts.labels,
            ended={state.value: counts[state] for state in ENDED},
            steps=finished,
            wall_seconds=time.monotonic() - self._started,
            training_seconds=self._training_seconds,
            max_age_steps=max((line["age/max"] for line in lines), default=0),
            utilization=self._utilization,
            peak_memory_mib=memory,
            seconds={**self._spans.seconds, **learner_seconds(lines)},
            costs=total_costs(lines),
            ended_by=self.ended_by,
        )
        summary: dict[str, Any] = summarize(
            self._evaluations.results[0], self._evaluations.results[-1], totals, beta=self._config.algorithm.beta
        )
        return write_report(
            self._folder.report,
            summary=summary,
            evaluations=self._evaluations.results,
            metrics=lines,
            sample_prompts=self._config.evaluation.sample_prompts,
        )
