"""Labelled-and-trained pairs/s, beside TRL: `python -m benchmarks.end_to_end configs/quickstart.yaml [key=value …]`.

pilaf_ray's asynchronous PILAF run and TRL's OnlineDPOTrainer (vanilla pairs, Hugging Face generation, which
is what a PILAF sampler there would be built on) take the same configuration one after the other: the same
model, prompts, oracle, lengths, pairs a step, dtype and cores. Steps count from when the pipeline is full
until it begins to drain; TRL's first step is left out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from pilaf_ray.config.loader import load_config


def pilaf_steps(config: Path, overrides: list[str], folder: Path) -> tuple[list[float], dict[str, float]]:
    """Seconds from one served version to the next in the steady part, and the roles' utilisation."""
    words = [
        *overrides,
        f"run.folder={folder}",
        "run.name=pilaf",
        "evaluation.prompts=4",
        "checkpoint.every_steps=100000",
    ]
    subprocess.run(
        [sys.executable, "-m", "pilaf_ray", "train", str(config), *words], check=True, stdout=subprocess.DEVNULL
    )
    staleness = load_config(config, words).pipeline.max_staleness_steps
    events = [json.loads(line) for line in (folder / "pilaf/events.jsonl").read_text().splitlines()]
    times = [event["time"] for event in events if event["event"] == "weights"]
    seconds = [after - before for before, after in pairwise(times)]
    summary = json.loads((folder / "pilaf/report/summary.json").read_text())
    return seconds[staleness : len(seconds) - staleness], summary["utilization"]


def trl_steps(config: Path, overrides: list[str], steps: int) -> list[float]:
    """Seconds of each of TRL's steps but the first."""
    words = [*overrides, f"run.max_steps={steps}"]
    threads = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trl_online_dpo", str(config), *words],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])["step_seconds"]
    return seconds[1:]


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    trl: int = 7,
) -> None:
    """Print a table and one line of JSON; ``--trl`` is the number of TRL's steps."""
    words = overrides or []
    pairs = load_config(config, words).learner.batch_pairs
    with tempfile.TemporaryDirectory() as folder:
        ours, utilization = pilaf_steps(config, words, Path(folder))
    theirs = trl_steps(config, words, trl)
    rows = {"pilaf_ray, PILAF, asynchronous": ours, "TRL OnlineDPOTrainer, vanilla": theirs}
    table = Table("system", "steps", "pairs/s (mean)", "slowest step", "fastest step")
    rates = {name: pairs / statistics.mean(seconds) for name, seconds in rows.items()}
    for name, seconds in rows.items():
        table.add_row(name, str(len(seconds)), f"{rates[name]:.3f}", f"{max(seconds):.1f} s", f"{min(seconds):.1f} s")
    ratio = rates["pilaf_ray, PILAF, asynchronous"] / rates["TRL OnlineDPOTrainer, vanilla"]
    console = Console(stderr=True)
    console.print(table)
    console.print(f"ratio: {ratio:.2f}")
    result = {"machine": machine(), "ratio": ratio, "pairs_per_second": rates, "step_seconds": rows}
    print(json.dumps({**result, "utilization": utilization}))


if __name__ == "__main__":
    typer.run(main)
