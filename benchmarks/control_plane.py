"""What the controller can drive: `python -m benchmarks.control_plane [--profile]`.

The real controller, gate, schedule, replica pools, weight-sync order and ledger, with roles that compute nothing. The
process keeps to one core. Two questions, one table each:

*Ceiling.* The roles answer at once: pairs/s from plan to trained, and CPU of the event loop's thread (the controller,
with the fake roles' own part) and of the ledger's thread for each pair.

*Overlap.* The roles take the given times: steps/s of the asynchronous run over those of the synchronous one, which is
the same with ``max_staleness_steps: 0``, and how much of the bound that is (benchmarks/arithmetic.py). CPU of
controller and ledger in the same runs is in the bound; what they wait for a disk is not.

Ray's messages are in neither: there is no Ray here.
"""

import asyncio
import gc
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from cProfile import Profile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.arithmetic import Latencies, async_bound, role_seconds, spread
from benchmarks.fake_roles import (
    FakeEngine,
    FakeGenerators,
    FakeLearner,
    FakeOracle,
    FakeReference,
    LedgerThread,
    Responses,
)
from benchmarks.machine import machine
from benchmarks.workers import forget_peak, peak_mib
from pilaf_ray.data.prompts import PromptCursor
from pilaf_ray.evaluation.step_metrics import step_metrics
from pilaf_ray.observability.sinks import JsonlSink
from pilaf_ray.pipeline import cycle_collector
from pilaf_ray.pipeline.budget import RunBudget
from pilaf_ray.pipeline.controller import Controller
from pilaf_ray.pipeline.ports import Ports
from pilaf_ray.pipeline.reference_reuse import ReusingReference
from pilaf_ray.pipeline.schedule import OnlineSchedule
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.pipeline.weight_sync import WeightSync
from pilaf_ray.sampling.plans import PilafSampler
from pilaf_ray.types import PairPlan, PairState, Prompt

PLAIN_SHARE = 0.5
"""Of PILAF's pairs: those that the reference model is asked about."""


AT_ONCE = Latencies()


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Sizes of the roles."""

    generators: int
    slots: int
    oracles: int
    references: int
    ranks: int
    tokens: int
    length_spread: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One run."""

    steps: int
    batch_pairs: int
    max_staleness_steps: int
    label_batch_pairs: int
    latencies: Latencies = AT_ONCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a run took; the ramp at its beginning and end is in ``seconds`` but not in ``step_seconds``."""

    seconds: float
    step_seconds: float
    controller_cpu: float
    ledger_cpu: float
    transactions: int
    peak_mib: float
    pairs: int


def make_plans(batch_pairs: int) -> Any:
    """The plan at an index, as a run with PILAF draws it."""
    prompts = [
        Prompt(prompt_id=f"{n:016x}", text=f"Write a review of film {n}.", token_ids=tuple(range(n % 97, n % 97 + 40)))
        for n in range(max(1024, batch_pairs))
    ]
    cursor, sampler = PromptCursor(prompts, seed=0), PilafSampler(beta=0.1)

    def plan(index: int) -> PairPlan:
        turn = cursor.at(index)
        return sampler.plan(turn.prompt, run_seed=0, epoch=turn.epoch, draw=turn.draw, index=index)

    return plan


async def run(settings: Settings, cluster: Cluster, ledger: LedgerThread, metrics: Path) -> Measured:
    """One run to its end, checked: every pair trained once, none older than the bound."""
    latencies = settings.latencies
    responses = Responses(tokens=cluster.tokens)
    engines = [
        FakeEngine(responses, slots=cluster.slots, latencies=latencies, length_spread=cluster.length_spread)
        for _ in range(cluster.generators)
    ]
    learner = FakeLearner(ranks=cluster.ranks, latencies=latencies)
    sync = WeightSync[int](
        push=learner.push,
        pulls=lambda: {number: engine.update_weights for number, engine in enumerate(engines)},
        probe=None,
        deadline_seconds=600.0,
    )
    sink, ends, ages = JsonlSink(metrics), [], [0]

    async def after_step(report: StepReport) -> None:
        sink.write(step_metrics(report))
        ages.append(max(report.ages))
        ends.append(time.perf_counter())

    async def after_sync(_: int) -> None: ...

    controller = Controller(
        ports=Ports(
            generator=FakeGenerators(engines),
            reference=ReusingReference(FakeReference(replicas=cluster.references, seconds=latencies.reference)),
            oracle=FakeOracle(replicas=cluster.oracles, seconds=latencies.label),
            learner=learner,
            store=ledger,
            weight_sync=sync,
        ),
        plan=make_plans(settings.batch_pairs),
        next_index=0,
        schedule=OnlineSchedule(batch_pairs=settings.batch_pairs),
        budget=RunBudget(max_steps=settings.steps),
        max_staleness_steps=settings.max_staleness_steps,
        label_batch_pairs=settings.label_batch_pairs,
        start_step=0,
        after_step=after_step,
        after_sync=after_sync,
    )
    before, started = time.thread_time(), time.perf_counter()
    await controller.run()
    seconds, cpu = time.perf_counter() - started, time.thread_time() - before
    pairs = settings.steps * settings.batch_pairs
    counts = (await ledger.counts()).check()
    assert counts[PairState.TRAINED] == counts.planned == pairs, f"the run is not what was asked for: {counts}"
    assert max(ages) <= settings.max_staleness_steps, f"a pair of age {max(ages)}"
    ramp = min(settings.max_staleness_steps + 1, (settings.steps - 1) // 2)
    return Measured(
        seconds=seconds,
        step_seconds=(ends[-1] - ends[ramp]) / (len(ends) - 1 - ramp),
        controller_cpu=cpu,
        ledger_cpu=ledger.cpu_seconds,
        transactions=ledger.transactions,
        peak_mib=peak_mib(),
        pairs=pairs,
    )


def measure(settings: Settings, cluster: Cluster, *, where: str, folder: Path | None, profile: bool) -> Measured:
    """A run on a ledger of its own; profiles are printed as they are made."""
    loops, ledgers = (Profile(), Profile()) if profile else (None, None)
    gc.collect()
    # As a run's controller does.
    cycle_collector.calm()
    forget_peak()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        url = f"sqlite:///{scratch}/preferences.db" if where == "disk" else "sqlite://"
        ledger = LedgerThread(url, profile=ledgers)
        try:
            if loops is not None:
                loops.enable()
            measured = asyncio.run(run(settings, cluster, ledger, Path(scratch) / "metrics.jsonl"))
        finally:
            if loops is not None:
                loops.disable()
            ledger.close()
    for thread, made in (("the event loop's thread", loops), ("the ledger's thread", ledgers)):
        if made is not None:
            print(f"\n{settings}, ledger: {where}: {thread}", file=sys.stderr)
            pstats.Stats(made, stream=sys.stderr).strip_dirs().sort_stats("tottime").print_stats(30)
    return measured


def ceiling_row(where: str, settings: Settings, runs: list[Measured]) -> dict[str, Any]:
    """Medians of one setting."""
    rates = [run.pairs / run.seconds for run in runs]
    return {
        "ledger": where,
        "label_batch_pairs": settings.label_batch_pairs,
        "batch_pairs": settings.batch_pairs,
        "in_flight": (settings.max_staleness_steps + 1) * settings.batch_pairs,
        "pairs": runs[0].pairs,
        "pairs_per_second": statistics.median(rates),
        "spread": spread(rates),
        "controller_cpu_us": statistics.median(1e6 * run.controller_cpu / run.pairs for run in runs),
        "ledger_cpu_us": statistics.median(1e6 * run.ledger_cpu / run.pairs for run in runs),
        "transactions_per_pair": statistics.median(run.transactions / run.pairs for run in runs),
        "peak_mib": max(run.peak_mib for run in runs),
    }


def ceilings(
    settings: list[Settings], cluster: Cluster, *, folder: Path | None, repetitions: int, profile: bool
) -> list[dict[str, Any]]:
    """Every setting on both ledgers, in turn."""
    runs: dict[tuple[str, int], list[Measured]] = {}
    for _ in range(repetitions):
        for number, setting in enumerate(settings):
            for where in ("disk", "memory"):
                made = measure(setting, cluster, where=where, folder=folder, profile=profile)
                runs.setdefault((where, number), []).append(made)
    return [ceiling_row(where, settings[number], made) for (where, number), made in runs.items()]


def overlap(setting: Settings, cluster: Cluster, *, folder: Path | None, repetitions: int) -> dict[str, Any]:
    """Asynchronous over synchronous, in turn, beside the bound."""
    runs: dict[int, list[Measured]] = {0: [], setting.max_staleness_steps: []}
    for _ in range(repetitions):
        for staleness, made in runs.items():
            one = replace(setting, max_staleness_steps=staleness)
            made.append(measure(one, cluster, where="disk", folder=folder, profile=False))
    steps = {staleness: [run.step_seconds for run in made] for staleness, made in runs.items()}
    every = [run for made in runs.values() for run in made]
    control = {
        "controller": statistics.median(run.controller_cpu / setting.steps for run in every),
        "ledger": statistics.median(run.ledger_cpu / setting.steps for run in every),
    }
    roles = role_seconds(
        setting.latencies,
        pairs=setting.batch_pairs,
        slots=cluster.generators * cluster.slots,
        oracles=cluster.oracles,
        references=cluster.references,
        reference_share=PLAIN_SHARE,
    )
    bound = async_bound(roles, control_seconds=sum(control.values()), max_staleness_steps=setting.max_staleness_steps)
    ratios = [sync / other for sync, other in zip(steps[0], steps[setting.max_staleness_steps], strict=True)]
    return {
        "steps": setting.steps,
        "batch_pairs": setting.batch_pairs,
        "latencies": asdict(setting.latencies),
        "length_spread": cluster.length_spread,
        "role_seconds": roles,
        "control_seconds": control,
        "bound": bound,
        "speed_up": statistics.median(ratios),
        "speed_ups": ratios,
        "of_bound": statistics.median(ratios) / bound,
        "step_seconds": {"synchronous": steps[0], "asynchronous": steps[setting.max_staleness_steps]},
        "max_staleness_steps": setting.max_staleness_steps,
    }


@contextmanager
def one_core() -> Iterator[None]:
    """This process keeps to one core meanwhile."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if value < 10 and value != int(value) else f"{value:,.0f}"


def print_tables(rows: list[dict[str, Any]], found: dict[str, Any] | None) -> None:
    console = Console(stderr=True, width=130)
    table = Table(title="the roles answer at once")
    names = {
        "ledger": "ledger on",
        "label_batch_pairs": "label batch",
        "in_flight": "pairs in flight",
        "pairs_per_second": "pairs/s",
        "spread": "spread",
        "controller_cpu_us": "controller CPU, µs a pair",
        "ledger_cpu_us": "ledger CPU, µs a pair",
        "transactions_per_pair": "transactions a pair",
        "peak_mib": "peak MiB",
    }
    for name in names.values():
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in names))
    console.print(table)
    if found is None:
        return
    console.print(overlap_table(found))


def overlap_table(found: dict[str, Any]) -> Table:
    """What was drawn, what it comes to, and what was found, a row each."""
    table = Table(title="the roles take their times", show_header=False)
    latencies, share = found["latencies"], found["length_spread"]
    mean = latencies["response"]
    drawn = f"{mean * (1 - share):g} to {mean * (1 + share):g} s, even between" if share else f"{mean:g} s each"
    others = ", ".join(f"{name} {seconds:g} s" for name, seconds in latencies.items() if name != "response")
    table.add_row("times drawn (--length-spread)", f"responses {drawn}; {others}")
    for name in ("role_seconds", "control_seconds"):
        listed = ", ".join(f"{role} {seconds:.3f} s" for role, seconds in found[name].items())
        table.add_row({"role_seconds": "work of a step", "control_seconds": "CPU of a step"}[name], listed)
    for name, seconds in found["step_seconds"].items():
        table.add_row(f"a step, {name}", f"{statistics.median(seconds):.3f} s")
    table.add_row("speed-up", f"{found['speed_up']:.2f}, {found['of_bound']:.0%} of the bound of {found['bound']:.2f}")
    return table


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of a ceiling run, at least.")] = 16_384,
    batch: Annotated[int, typer.Option(help="Pairs of a step.")] = 512,
    staleness: Annotated[int, typer.Option(help="max_staleness_steps.")] = 2,
    label_batch: Annotated[list[int] | None, typer.Option(help="label_batch_pairs; may be repeated.")] = None,
    generators: Annotated[int, typer.Option(help="Generator replicas.")] = 64,
    slots: Annotated[int, typer.Option(help="Responses of a generator at one time.")] = 64,
    oracles: Annotated[int, typer.Option(help="Oracle replicas.")] = 8,
    references: Annotated[int, typer.Option(help="Reference replicas.")] = 8,
    ranks: Annotated[int, typer.Option(help="Learner ranks.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a response.")] = 64,
    length_spread: Annotated[float, typer.Option(help="Times of responses lie evenly in 1 ± this of the mean.")] = 0.0,
    overlap_steps: Annotated[int, typer.Option(help="Steps of an overlap run; 0: none.")] = 12,
    overlap_batch: Annotated[int, typer.Option(help="Pairs of a step there; half of all slots fills them.")] = 2048,
    response_seconds: Annotated[float, typer.Option(help="Of one response.")] = 2.0,
    label_seconds: Annotated[float, typer.Option(help="Of one pair at an oracle.")] = 5e-4,
    reference_seconds: Annotated[float, typer.Option(help="Of one pair at a reference.")] = 4e-3,
    step_seconds: Annotated[float, typer.Option(help="Of one learner step.")] = 1.8,
    push_seconds: Annotated[float, typer.Option(help="Of publishing a version.")] = 0.1,
    pull_seconds: Annotated[float, typer.Option(help="Of taking a version.")] = 0.1,
    repetitions: Annotated[int, typer.Option(help="Runs of each setting.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where ledgers on disk are made; a temporary folder.")] = None,
    profile: Annotated[bool, typer.Option(help="Print the functions that take most CPU; slows the run.")] = False,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print tables and one line of JSON."""
    cluster = Cluster(
        generators=generators,
        slots=slots,
        oracles=oracles,
        references=references,
        ranks=ranks,
        tokens=tokens,
        length_spread=length_spread,
    )
    settings = [
        Settings(
            steps=max(3, -(-pairs // batch)),
            batch_pairs=batch,
            max_staleness_steps=staleness,
            label_batch_pairs=size,
        )
        for size in label_batch or [4, 64]
    ]
    latencies = Latencies(
        response=response_seconds,
        label=label_seconds,
        reference=reference_seconds,
        step=step_seconds,
        push=push_seconds,
        pull=pull_seconds,
    )
    timed = Settings(
        steps=overlap_steps,
        batch_pairs=overlap_batch,
        max_staleness_steps=staleness,
        label_batch_pairs=max(label_batch or [64]),
        latencies=latencies,
    )
    with one_core():
        rows = ceilings(settings, cluster, folder=folder, repetitions=repetitions, profile=profile)
        found = overlap(timed, cluster, folder=folder, repetitions=repetitions) if overlap_steps else None
    print_tables(rows, found)
    described = {"repetitions": repetitions, **asdict(cluster)}
    result = {"machine": machine(), **described, "ceiling": rows, "overlap": found}
    print(json.dumps(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
