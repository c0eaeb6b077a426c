"""Memory of every role over a long run: ``python -m benchmarks.soak --minutes 60``.

Runs the tiny model, unless told otherwise, and reads now and again how much memory is each process's own (its unique
set: what it shares, such as Ray's object store and libraries, does not count). Writes ``soak.csv`` and ``soak.png`` and
prints each role's slope after the first third, in MiB an hour, with a 95 % interval: memory that is flat has one
around 0. The interval is a moving-block bootstrap of what the line leaves over, because neighbouring readings
resemble each other.
"""

import csv
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.chaos import START_SECONDS
from benchmarks.chaos_job import ROOT, Job, leave_nothing_behind
from benchmarks.chaos_journal import commit
from benchmarks.machine import machine
from pilaf_ray.evaluation.statistics import Interval, percentile_interval

WARM_UP = 1 / 3
"""Share of the time that no slope is read from: allocators and caches fill up first."""
HOUR = 3600.0

Series = list[tuple[float, float]]
"""Seconds since the first reading, and MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One role at one moment; all its processes together."""

    seconds: float
    step: int
    role: str
    processes: int
    mib: float


def read(job: Job, seconds: float) -> list[Reading]:
    """Every role's memory now."""
    mib: dict[str, list[float]] = defaultdict(list)
    for role, process in job.processes():
        try:
            mib[role].append(process.memory_full_info().uss / 2**20)
        except psutil.Error:
            continue
    step = job.last_step()
    return [
        Reading(seconds=seconds, step=step, role=role, processes=len(values), mib=sum(values))
        for role, values in sorted(mib.items())
    ]


def by_role(readings: Sequence[Reading]) -> dict[str, Series]:
    """The readings of each role, in order."""
    series: dict[str, Series] = defaultdict(list)
    for reading in readings:
        series[reading.role].append((reading.seconds, reading.mib))
    return dict(series)


def slope(series: Series, *, seed: int = 0, draws: int = 1000) -> Interval:
    """MiB an hour after the warm-up, by least squares, with its interval; needs ten readings there."""
    seconds, mib = np.asarray(series, dtype=np.float64).T
    late = seconds >= seconds[0] + WARM_UP * (seconds[-1] - seconds[0])
    hours, mib = seconds[late] / HOUR, mib[late]
    if len(hours) < 10:
        raise ValueError(f"{len(hours)} readings after the warm-up are too few for a slope: run for longer")
    line = np.polyfit(hours, mib, 1)
    left = mib - np.polyval(line, hours)
    length = max(2, round(len(left) ** 0.5))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        starts = rng.integers(0, len(left), size=-(-len(left) // length))
        drawn = np.concatenate([np.take(left, range(start, start + length), mode="wrap") for start in starts])
        found.append(float(np.polyfit(hours, np.polyval(line, hours) + drawn[: len(left)], 1)[0]))
    return percentile_interval(float(line[0]), found)


def write_csv(readings: Sequence[Reading], file: Path) -> None:
    """One line a role and moment."""
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["seconds", "step", "role", "processes", "mib"])
        rows.writerows([f"{r.seconds:.1f}", r.step, r.role, r.processes, f"{r.mib:.1f}"] for r in readings)


def draw(series: Mapping[str, Series], slopes: Mapping[str, Interval], file: Path) -> None:
    """One small panel a role, each on a scale of its own that begins at 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 * len(series)), layout="constrained")
    panels: Any = figure.subplots(len(series), 1, sharex=True, squeeze=False)
    for panel, (role, readings) in zip(panels[:, 0], series.items(), strict=True):
        minutes, mib = [second / 60 for second, _ in readings], [value for _, value in readings]
        panel.plot(minutes, mib, linewidth=1)
        panel.axvspan(minutes[0], minutes[0] + WARM_UP * (minutes[-1] - minutes[0]), color="0.93")
        panel.set_ylim(0, 1.15 * max(mib))
        panel.set_title(f"{role}: {slopes[role]} MiB an hour", fontsize=9, loc="left")
        panel.set_ylabel("MiB")
    panels[-1, 0].set_xlabel("minutes; grey: warm-up")
    figure.savefig(file, dpi=120)


def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="After the first steps.")] = 60.0,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between readings.")] = 5.0,
    config: Annotated[Path, typer.Option(help="What is run.")] = ROOT / "configs/tiny.yaml",
    folder: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="Where CSV, PNG and JSON go.")] = ROOT / "docs/results/soak",
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the run.")] = None,
) -> None:
    """Run without faults and say how the memory of each role changes."""
    leave_nothing_behind()
    job = Job(folder.resolve(), f"soak-{config.stem}", overrides or [], config=config.resolve(),
              base=["run.restarts=1"], struck=False)  # fmt: skip
    readings: list[Reading] = []
    try:
        job.start("run.max_steps=1000000")
        job.wait(lambda: job.last_step() >= 2 or not job.runs(), START_SECONDS)
        started = time.monotonic()
        while (passed := time.monotonic() - started) < 60 * minutes and job.runs():
            readings += read(job, passed)
            time.sleep(every)
        code = job.stop(START_SECONDS)
    finally:
        job.end()
    results.mkdir(parents=True, exist_ok=True)
    write_csv(readings, results / "soak.csv")
    moments = len({reading.seconds for reading in readings})
    # What came or went meanwhile has no slope.
    series = {role: found for role, found in by_role(readings).items() if len(found) > moments / 2}
    slopes = {role: slope(found) for role, found in series.items()}
    draw(series, slopes, results / "soak.png")
    told = {
        "minutes": minutes,
        "steps": job.last_step(),
        "exit_code": code,
        "commit": commit(),
        "mib_at_the_end": {role: round(found[-1][1], 1) for role, found in series.items()},
        "mib_an_hour": {r: [round(v, 1) for v in (s.value, s.low, s.high)] for r, s in slopes.items()},
        "machine": machine(),
    }
    (results / "soak.json").write_text(json.dumps(told, indent=1) + "\n")
    typer.echo(json.dumps(told, indent=1))


if __name__ == "__main__":
    typer.run(main)
