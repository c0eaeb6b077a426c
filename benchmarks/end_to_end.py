"""Labelled-and-trained pairs/s, beside TRL: `python -m benchmarks.end_to_end configs/quickstart.yaml [key=value …]`.

pilaf_ray's asynchronous run, the same without staleness (one role after the other), and TRL's OnlineDPOTrainer
(vanilla pairs, Hugging Face generation, which is what a PILAF sampler there would be built on; once as it is and
once with our settings of glibc) take the same configuration in turn: the same model, prompts, oracle, lengths, pairs
a step, optimiser, dtype and cores. ``--vanilla`` adds ours with TRL's pairs. Steps, and how busy the roles are, count
from when the pipeline is full until it begins to drain; TRL's first step is left out.

What asynchrony gives stands beside its bound: the seconds that the roles work for a step in the synchronous run,
summed, over the largest. With ``--rounds`` all of that is done again; ratios are made within each round.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.arithmetic import async_bound
from benchmarks.chaos_journal import read_lines
from benchmarks.machine import machine
from pilaf_ray.actors.launch import CPU_ALLOCATOR
from pilaf_ray.config.loader import load_config

ASYNCHRONOUS, SYNCHRONOUS = "pilaf_ray, PILAF, asynchronous", "pilaf_ray, PILAF, synchronous"
VANILLA = "pilaf_ray, vanilla, asynchronous"
TRL, TUNED_TRL = "TRL OnlineDPOTrainer, vanilla", "TRL, with our settings of glibc"


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What one system needed."""

    step_seconds: Sequence[float]
    """Of the steady steps, each."""
    utilization: Mapping[str, float] = field(default_factory=dict)
    """Share of those steps that each role was busy; where there are roles."""
    role_seconds: Mapping[str, float] = field(default_factory=dict)
    """That each role was busy for a step, on their mean."""
    peak_memory_mib: Mapping[str, float] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, float]] = ()
    """TRL's, where evaluation.every_steps asks for them: step, seconds of training, reward."""


def run_to_its_end(config: Path, overrides: Sequence[str], folder: Path) -> Path:
    """A whole run that saves nothing on the way; returns its own folder in ``folder``."""
    words = [*overrides, f"run.folder={folder}", "run.name=pilaf", "checkpoint.every_steps=100000"]
    command = [sys.executable, "-m", "pilaf_ray", "train", str(config), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "pilaf"


def run_pilaf_ray(config: Path, overrides: list[str], folder: Path) -> Timing:
    """A whole run in ``folder``; its steps are from one served version to the next."""
    run = run_to_its_end(config, [*overrides, "evaluation.prompts=4"], folder)
    staleness = load_config(config, overrides).pipeline.max_staleness_steps
    events, lines = (read_lines(run / name) for name in ("events.jsonl", "metrics.jsonl"))
    times = [event["time"] for event in events if event["event"] == "weights"]
    # From when the pipeline is full until it begins to drain; the first version is that of step 1.
    steady = slice(staleness, len(times) - 1 - staleness)
    seconds = [after - before for before, after in pairwise(times)][steady]
    busy = utilization(lines[1:][steady])
    summary = json.loads((run / "report/summary.json").read_text())
    return Timing(
        step_seconds=seconds,
        utilization=busy,
        role_seconds={role: share * statistics.mean(seconds) for role, share in busy.items()},
        peak_memory_mib=summary["peak_memory_mib"],
    )


def utilization(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean share of those steps that each role was busy, from their metrics."""
    roles = sorted({key.removeprefix("busy/") for line in lines for key in line if key.startswith("busy/")})
    return {role: statistics.mean(line[f"busy/{role}"] for line in lines) for role in roles}


def run_trl(config: Path, overrides: list[str], steps: int, *, tuned: bool) -> Timing:
    """TRL's trainer in a process of its own, with a thread for each core; ``tuned``: with our settings of glibc."""
    words = [*overrides, f"run.max_steps={steps}"]
    threads = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trl_online_dpo", str(config), *words],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, **(CPU_ALLOCATOR if tuned else {})},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return Timing(step_seconds=found["step_seconds"][1:], evaluations=found["evaluations"])


def measure(config: Path, words: list[str], *, trl_steps: int, vanilla: bool) -> dict[str, Timing]:
    """One round: each system, one after the other."""
    runs = {ASYNCHRONOUS: words, SYNCHRONOUS: [*words, "pipeline.max_staleness_steps=0"]}
    if vanilla:
        runs[VANILLA] = [*words, "sampler={type: vanilla}"]
    found = {}
    for name, own in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run_pilaf_ray(config, own, Path(folder))
    if trl_steps:
        found |= {name: run_trl(config, words, trl_steps, tuned=name == TUNED_TRL) for name in (TRL, TUNED_TRL)}
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The systems beside each other."""

    pairs_per_second: Mapping[str, float]
    over_trl: Mapping[str, float]
    """Times TRL's pairs/s; empty where it did not run."""
    speedup: float
    """Of asynchrony: times the synchronous run's pairs/s."""
    bound: float
    """Of that speedup, by :func:`benchmarks.arithmetic.async_bound`."""


def compare(found: Mapping[str, Timing], *, pairs: int, max_staleness_steps: int) -> Comparison:
    """Rates, ratios, and asynchrony beside its bound; ``pairs`` are a step's."""
    rates = {name: pairs / statistics.mean(timing.step_seconds) for name, timing in found.items()}
    return Comparison(
        pairs_per_second=rates,
        over_trl={name: rate / rates[TRL] for name, rate in rates.items()} if TRL in rates else {},
        speedup=rates[ASYNCHRONOUS] / rates[SYNCHRONOUS],
        bound=async_bound(
            found[SYNCHRONOUS].role_seconds, max_staleness_steps=max_staleness_steps, control_seconds=0.0
        ),
    )


def over_the_rounds(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Medians of what each round compares, and in ``range`` the smallest and largest."""
    told = [asdict(comparison) for comparison in comparisons]
    share = [comparison.speedup / comparison.bound for comparison in comparisons]
    series: dict[str, list[float]] = {
        "speedup": [one["speedup"] for one in told], "bound": [one["bound"] for one in told], "of_bound": share
    }  # fmt: skip
    for what in ("pairs_per_second", "over_trl"):
        series |= {f"{what}: {name}": [one[what][name] for one in told] for name in told[0][what]}
    return {
        "median": {name: statistics.median(values) for name, values in series.items()},
        "range": {name: [min(values), max(values)] for name, values in series.items()},
    }


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    trl: Annotated[int, typer.Option(min=0, help="TRL's steps; 0: ours only.")] = 7,
    vanilla: Annotated[bool, typer.Option(help="Also ours with vanilla pairs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="So many times all of them.")] = 1,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print tables and one line of JSON."""
    words = overrides or []
    settings = load_config(config, words)
    staleness, pairs = settings.pipeline.max_staleness_steps, settings.learner.batch_pairs
    fewest = 2 * staleness + 3
    if settings.run.max_steps < fewest:
        raise typer.BadParameter(f"run.max_steps={settings.run.max_steps} leaves no steady steps: set {fewest} or more")
    told, comparisons = [], []
    for _ in range(rounds):
        found = measure(config, words, trl_steps=trl, vanilla=vanilla)
        comparisons.append(compare(found, pairs=pairs, max_staleness_steps=staleness))
        show(found, comparisons[-1])
        systems = {name: asdict(timing) for name, timing in found.items()}
        told.append({**asdict(comparisons[-1]), "systems": systems})
    result = {"machine": machine(), "overrides": words, **over_the_rounds(comparisons), "rounds": told}
    print(json.dumps(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


def show(found: Mapping[str, Timing], comparison: Comparison) -> None:
    """One round as a table."""
    table = Table("system", "steps", "pairs/s (mean)", "over TRL", "slowest step", "fastest step", "busy")
    for name, timing in found.items():
        steps, over = timing.step_seconds, comparison.over_trl.get(name)
        busy = ", ".join(f"{role} {share:.0%}" for role, share in timing.utilization.items())
        rate, ratio = f"{comparison.pairs_per_second[name]:.3f}", f"{over:.2f}" if over else ""
        table.add_row(name, str(len(steps)), rate, ratio, f"{max(steps):.1f} s", f"{min(steps):.1f} s", busy)
    console = Console(stderr=True, width=160)
    console.print(table)
    speedup, bound = comparison.speedup, comparison.bound
    console.print(f"asynchronous over synchronous: {speedup:.2f}; bound {bound:.2f}; {speedup / bound:.0%} of it")


if __name__ == "__main__":
    typer.run(main)
