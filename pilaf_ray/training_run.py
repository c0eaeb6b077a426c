"""One run, from validated configuration to report."""

import asyncio
import logging
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from pilaf_ray import build
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.handles import StoreHandle
from pilaf_ray.actors.launch import Roles
from pilaf_ray.actors.weights import make_weight_sync
from pilaf_ray.build_samplers import build_pair_source
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.console.address import require_free_port
from pilaf_ray.engines.checkpoint import CheckpointStore, read_manifest
from pilaf_ray.engines.learner_layout import require_loadable
from pilaf_ray.errors import PauseError
from pilaf_ray.evaluation.evaluator import Evaluator
from pilaf_ray.evaluation.step_metrics import spent_before
from pilaf_ray.float16_roles import slow_float16_roles
from pilaf_ray.generator_numbers import follow_numbers
from pilaf_ray.held_out_run import HeldOutEvaluations
from pilaf_ray.learner_side import LearnerSide
from pilaf_ray.observability.call_trace import CallTrace
from pilaf_ray.observability.logs import setup_logging
from pilaf_ray.pipeline import cycle_collector
from pilaf_ray.pipeline.controller import STOPPED, Controller
from pilaf_ray.pipeline.ports import LearnerPort, Ports
from pilaf_ray.pipeline.recovery import train_through_losses
from pilaf_ray.pipeline.reference_reuse import ReusingReference
from pilaf_ray.pipeline.schedule import Schedule
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.pipeline.stopping import StopRequests
from pilaf_ray.pipeline.turns import own_device
from pilaf_ray.quantised_run import require_same_start, with_quantised_base, write_run_base
from pilaf_ray.restarts import CHILD
from pilaf_ray.role_startup import start_roles
from pilaf_ray.run_checkpoints import RunCheckpoints, learner_layouts
from pilaf_ray.run_folder import RunFolder, keep_prompts, open_run_folder
from pilaf_ray.run_guards import RunGuards
from pilaf_ray.run_journal import RunJournal
from pilaf_ray.run_mirror import fetch_run, require_new
from pilaf_ray.run_restoring import RestoredRun, RunRestorer
from pilaf_ray.types import TokenPair

logger = logging.getLogger(__name__)

STOPPING = "stopping: the step under way is finished and saved; Ctrl-C again ends at once, without that"

RESUMED_PORT_SECONDS, RESTARTED_PORT_SECONDS = 10.0, 60.0
"""So long the console's port may still be taken: where somebody resumes a run, and where its controller was lost."""

SPARE_GENERATORS = 16
"""So many can be added to a run on a private cluster, as far as Ray's counts go."""


def train(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Path:
    """Run ``config`` to its end, or until Ctrl-C; returns the run folder.

    Raises:
        PilafError: with one line that says what is wrong and how to mend it.
    """
    console = console or Console()
    for line in (*config.departures_from_theory, *config.idle_settings, *slow_float16_roles(config)):
        console.print(f"warning: {line}", markup=False)
    path = Path(config.run.folder) / config.run.name
    if not resume:
        require_new(config)
    elif (step := fetch_run(config, path)) is not None:
        console.print(f"resuming from step {step} at {config.checkpoint.mirror}", markup=False)
    config = build.with_warm_start(config, saved=path / "config.json" if resume else None)
    build.check_logging(config)
    if config.serves_console and not resume:
        # Served from this machine once all roles have started; what is in the way is said before.
        require_free_port(config.console.host, config.console.port)
    inputs = build.build_inputs(config)
    start, config = config.model.policy, with_quantised_base(config, path)
    if resume:
        require_same_start(config, start=start)
    with open_run_folder(path, config_json=config.model_dump_json(), resume=resume) as folder:
        setup_logging("controller", folder.logs)
        if config.serves_console and resume:
            # Not before the folder is ours: a run that is under way is then said to be.
            require_free_port(config.console.host, config.console.port, patience_seconds=_port_patience())
        write_run_base(config, start=start, console=console)
        train = inputs.train
        keep_prompts(folder, path=config.prompts.train.path, count=train.count, fingerprint=train.fingerprint)
        goes_on = True
        while goes_on:
            # With a reference that is reset, every round is a run of its own that resumes the one before.
            goes_on = _train_with_one_reference(config, inputs, folder, console, resume=resume)
            resume = True
    return path


def _port_patience() -> float:
    """How long what the attempt before served may take to end; at an automatic restart nobody is there to try again."""
    return RESTARTED_PORT_SECONDS if CHILD in os.environ else RESUMED_PORT_SECONDS


def _train_with_one_reference(
    config: RunConfig, inputs: build.RunInputs, folder: RunFolder, console: Console, *, resume: bool
) -> bool:
    """Whether training goes on with another reference."""
    checkpoints = CheckpointStore(folder.checkpoints, keep_last=config.checkpoint.keep_last)
    found = checkpoints.latest() if resume else None
    if found is not None:
        require_loadable(found[1], read_manifest(found[1]), learner_layouts(config))
    config, until = build.with_round_reference(config, checkpoints, step=found[0] if found else 0)
    # CPUs of a private cluster are a count, not cores: generators that are asked for later find some. Those that
    # follow nodes must not take them for room.
    spare = 0.0 if config.generation.elastic else SPARE_GENERATORS * config.resources.generator.cpus
    with ray_cluster(address=config.resources.address, num_cpus=config.total_cpus + spare):
        run = TrainingRun(config, inputs, folder, console, until_step=until)
        cycle_collector.calm()
        asyncio.run(run.run(resume=resume))
    return run.ended_by == build.ROUND_ENDED


class TrainingRun:
    """Starts the roles, drives the controller, and begins anew from the checkpoint where the learner is lost."""

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
        self._roles: Roles | None = None
        self._journal = RunJournal(
            config,
            folder,
            console,
            roles=lambda: self._roles.computing if self._roles is not None else {},
            others=lambda: {"store": self._roles.store} if self._roles is not None else {},
        )
        self._checkpoints = RunCheckpoints(config, folder, self._journal, ledger=self._ledger)
        self._restorer = RunRestorer(config, self._checkpoints.store, report=self._journal.event)
        self._plans = build.PlanSource(prompts=inputs.train, sampler=inputs.sampler, seed=config.run.seed)
        self._guards = RunGuards(config, tell=self._journal.alarm)
        self._pause = ""
        """What a guard said whose policy is to pause; empty until one has."""
        self._furthest = 0

    async def run(self, *, resume: bool) -> None:
        """The whole run; on Ctrl-C while it trains the step under way is finished and saved."""
        trace = CallTrace(self._folder.trace) if self._config.logging.trace else nullcontext()
        async with self._journal.kept_status():
            with trace:
                await self._run(resume=resume)

    async def _run(self, *, resume: bool) -> None:
        journal = self._journal
        with journal.on_terminal():
            journal.started(self._folder.attempt)
            journal.phase("loading models")
            with journal.spans.measure("start"):
                roles = await self._start_roles()
                begun = await self._restore(roles, resume=resume)
            held_out = self._held_out(roles)
            journal.evaluations.load(until_step=begun.step)
            if not journal.evaluations.results:
                await held_out.evaluate(begun.step)
            stop = StopRequests(lambda: journal.phase(STOPPING))
            with stop.heard():
                finished = await self._train_through(roles, held_out, begun, stop)
                await self._checkpoints.copied()
            if stop.requested:
                # Also where it came when nothing was left to train: the rest takes long, and a resumed run does it.
                self.ended_by = STOPPED
            if self.ended_by in (STOPPED, self._pause):
                why = f": {self._pause}" if self.ended_by == self._pause else ""
                journal.phase(f"stopped after step {finished}{why}; continue with --resume")
                return
            if self.ended_by == build.ROUND_ENDED:
                journal.close()
                return
            if journal.evaluations.results[-1].step != finished:
                await held_out.evaluate(finished)
            text = await self._report(roles, finished)
            await roles.close()
        journal.close()
        self._console.print(Markdown(text))
        self._console.print(f"report: {self._folder.report}", markup=False)

    async def _start_roles(self) -> Roles:
        self._roles = await start_roles(
            self._config, self._inputs, self._folder, report=self._journal.event, console=self._console
        )
        self._journal.event("roles ready", seconds=self._journal.seconds)
        self._side = self._learner_side(self._roles)
        return self._roles

    def _ledger(self) -> StoreHandle:
        assert self._roles is not None, "nothing is saved before the roles are there"
        return self._roles.store

    def _learner_side(self, roles: Roles) -> LearnerSide:
        return LearnerSide(self._config, self._inputs.train, roles, warn=self._warn, report=self._journal.event)

    def _warn(self, step: int, complaint: str) -> None:
        self._journal.event("reward model unhealthy", step=step, complaint=complaint)
        self._journal.phase(f"training; reward model unhealthy since step {step}: {complaint}")

    async def _restore(self, roles: Roles, *, resume: bool, rebuilt: bool = False) -> RestoredRun:
        """Put the roles back to the newest checkpoint, and the metrics with them."""
        self._sync = make_weight_sync(
            roles,
            probe_items=self._probe_items(),
            tolerance=build.probe_tolerance(self._config, self._inputs),
            deadline_seconds=self._config.weights.deadline_seconds,
            report=self._journal.event,
        )
        restored = await self._restorer.restore(
            roles, self._side, self._sync, resume=resume, rebuilt=rebuilt, set_aside=self._guards.set_aside
        )
        self._guards.set_aside = []
        self._journal.cut_after(restored.step)
        if not rebuilt:
            self._guards.remember(self._journal.steps())
        return restored

    def _probe_items(self) -> list[TokenPair]:
        """A fixed sequence of real prompt tokens, cut in two."""
        tokens = self._inputs.evaluation.prompts[0].token_ids
        half = max(1, len(tokens) // 2)
        return [(tokens[:half], tokens[half:])]

    def _held_out(self, roles: Roles) -> HeldOutEvaluations:
        prompts = self._inputs.evaluation.prompts
        evaluator = Evaluator(
            prompts=prompts,
            generator=roles.generators,
            reference=roles.reference,
            oracle=roles.oracle,
            seed=self._config.run.seed,
            batches_at_once=self._config.reference.replicas,
        )
        return HeldOutEvaluations(self._config, evaluator, self._journal, prompts=len(prompts))

    async def _train_through(
        self, roles: Roles, held_out: HeldOutEvaluations, begun: RestoredRun, stop: StopRequests
    ) -> int:
        """Train to the end, whatever the learner dies of on the way; returns the last step."""

        async def rebuild() -> RestoredRun:
            self._journal.phase("rebuilding the policy learner")
            roles.generators.forget_weights()
            await asyncio.gather(*(group.rebuild() for group in (roles.learner, roles.reward) if group is not None))
            self._side = self._learner_side(roles)
            restored = await self._restore(roles, resume=True, rebuilt=True)
            self._journal.evaluations.load(until_step=restored.step)
            return restored

        self._furthest = begun.step
        report = self._journal.event
        async with follow_numbers(self._config, roles, self._folder.path, report=report):
            with self._journal.training():
                finished = await train_through_losses(
                    begun,
                    train=lambda work: self._train(roles, held_out, work, stop),
                    rebuild=rebuild,
                    furthest_step=lambda: self._furthest,
                    policy=build.supervision_policy(self._config),
                    stop=stop,
                    report=report,
                )
        return await self._stopped_without_a_learner() if finished is None else finished

    async def _stopped_without_a_learner(self) -> int:
        """The step of the newest checkpoint, once it is on disk."""
        await self._checkpoints.store.finish()
        step = max(self._checkpoints.store.steps(), default=0)
        self._journal.event("training ended", step=step, by=STOPPED)
        return step

    async def _train(self, roles: Roles, held_out: HeldOutEvaluations, begun: RestoredRun, stop: StopRequests) -> int:
        journal = self._journal
        schedule = build.build_schedule(self._config, start_step=begun.step)
        async with self._side.running(begun.step) as learner:
            controller = self._controller(roles, self._guards.over(learner), held_out, schedule, begun)
            journal.phase("training")
            if self._pause:
                # The learner was lost before the run that was to end had ended.
                controller.request_stop(self._pause)
            refused = False
            try:
                with stop.passed_on(controller.request_stop):
                    finished = await controller.run()
            except PauseError as error:
                # What the learner holds now is not worth saving.
                finished, self._pause, refused = controller.step, str(error), True
        self.ended_by = controller.ended_by or self._pause or STOPPED
        journal.event("training ended", step=finished, by=self.ended_by)
        logger.info("training ended after step %d by %s", finished, self.ended_by)
        journal.phase(f"training ended after step {finished}: {self.ended_by}")
        if finished > begun.step and not refused and self._checkpoints.newest != finished:
            await self._checkpoints.save(finished, self._side.save, serving=schedule.served_version(finished))
        await self._checkpoints.store.finish()
        return finished

    def _controller(
        self, roles: Roles, learner: LearnerPort, held_out: HeldOutEvaluations, schedule: Schedule, begun: RestoredRun
    ) -> Controller:
        config = self._config

        async def after_step(report: StepReport) -> None:
            await self._after_step(report, roles, schedule, controller)

        self._journal.begin_steps()
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
            next_index=begun.next_index,
            schedule=schedule,
            budget=build.build_budget(config, spent=spent_before(self._folder.metrics), until_step=self._until_step),
            # A round is sampled from one policy: nothing is sampled ahead of its end.
            max_staleness_steps=0 if config.schedule.type == "iterative" else config.pipeline.max_staleness_steps,
            # People answer one pair at a time: none waits for its neighbours.
            label_batch_pairs=1 if config.oracle.asks_people else config.pipeline.label_batch_pairs,
            start_step=begun.step,
            after_step=after_step,
            after_sync=self._after_sync,
            evaluate=held_out.due,
            unfinished=begun.unfinished,
            fail_fast=config.pipeline.fail_fast,
            pairs=build_pair_source(
                config, generator=roles.generators, reference=roles.reference, oracle=roles.oracle, reward=roles.reward
            ),
            turn=own_device if roles.turns is None else partial(roles.turns.turn, "learner"),
        )
        return controller

    async def _after_step(self, report: StepReport, roles: Roles, schedule: Schedule, controller: Controller) -> None:
        """Write the step down, look at its guards, and save it where that is due."""
        metrics = self._journal.step(report)
        await self._journal.pairs(roles.store.counts)
        step = report.result.step
        self._furthest = max(self._furthest, step)

        def pause(reason: str) -> None:
            self._pause = reason
            controller.request_stop(reason)

        self._guards.look(metrics, report.batch, pause=pause)
        # A round is resumed from the policy that samples it.
        ends_round = self._config.schedule.type == "iterative" and schedule.served_version(step) == step
        # Where the learner shares its device, its turn is now: it would have to come back for a checkpoint later.
        if step % self._config.checkpoint.every_steps == 0 or ends_round or controller.is_stopping:
            await self._checkpoints.save(step, self._side.save, serving=schedule.served_version(step))

    async def _after_sync(self, step: int) -> None:
        """The weights of ``step`` are served everywhere: rollouts under them begin."""
        self._side.served()
        self._journal.event("weights", version=step)

    async def _report(self, roles: Roles, finished: int) -> str:
        counts = (await roles.store.counts()).check()
        usages = [usage for port in roles.computing.values() for usage in await port.usage()]
        return self._journal.report(counts, usages, steps=finished, ended_by=self.ended_by)
