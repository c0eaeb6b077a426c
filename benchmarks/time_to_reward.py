"""Seconds of training to a held-out reward, beside TRL: `python -m benchmarks.time_to_reward configs/quickstart.yaml`.

pilaf_ray's asynchronous run and TRL's OnlineDPOTrainer (with our settings of glibc) take the same configuration in
turn, as in `benchmarks.end_to_end`; both prefer the response with the larger reward, as TRL does. Every so many steps
the reward of one response to each held-out prompt is measured. A reward between two measurements is reached at the
moment between them that a straight line gives. Starting and loading are on nobody's clock; ours has what the
evaluations cost the run, which goes on meanwhile, and TRL's has not.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.chaos_journal import read_lines
from benchmarks.end_to_end import run_to_its_end, run_trl
from benchmarks.machine import machine
from benchmarks.options import several

ARGMAX = "oracle.label_rule={type: argmax}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The held-out reward of one policy."""

    step: int
    seconds: float
    """Of training, until this policy could be sampled from."""
    reward: float


def seconds_to(reward: float, curve: Sequence[Point]) -> float | None:
    """When ``reward`` is passed for the first time; None if it never is."""
    if curve and curve[0].reward >= reward:
        return curve[0].seconds
    for before, after in pairwise(curve):
        if before.reward < reward <= after.reward:
            share = (reward - before.reward) / (after.reward - before.reward)
            return before.seconds + share * (after.seconds - before.seconds)
    return None


def pilaf_ray_curve(config: Path, words: Sequence[str], folder: Path) -> list[Point]:
    """A whole run in ``folder``."""
    events = read_lines(run_to_its_end(config, words, folder) / "events.jsonl")
    served = {event["version"]: event["time"] for event in events if event["event"] == "weights"}
    found = {event["step"]: event for event in events if event["event"] == "evaluation"}
    began = found[0]["time"]
    return [
        Point(step=step, seconds=served[step] - began if step else 0.0, reward=event["reward"])
        for step, event in sorted(found.items())
    ]


def trl_curve(config: Path, words: Sequence[str], steps: int) -> list[Point]:
    """TRL's trainer in a process of its own."""
    return [Point(**line) for line in run_trl(config, list(words), steps, tuned=True).evaluations]  # type: ignore[arg-type]


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each.")] = 30,
    every: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 5,
    rewards: Annotated[str, typer.Option(help="Held-out rewards, separated by commas.")] = "1.75,2,2.25,2.5",
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print a table and one line of JSON."""
    wanted = several(rewards, float)
    words = [*(overrides or []), f"evaluation.every_steps={every}", f"run.max_steps={steps}", ARGMAX]
    with tempfile.TemporaryDirectory() as folder:
        curves = {"pilaf_ray, PILAF, asynchronous": pilaf_ray_curve(config, words, Path(folder))}
    curves["TRL OnlineDPOTrainer, vanilla"] = trl_curve(config, words, steps)
    table = Table("system", *(f"s to {reward:g}" for reward in wanted), "highest", "s in all")
    reached: dict[str, dict[str, float | None]] = {}
    for name, curve in curves.items():
        reached[name] = {f"{reward:g}": seconds_to(reward, curve) for reward in wanted}
        times = ["–" if seconds is None else f"{seconds:.0f}" for seconds in reached[name].values()]
        table.add_row(name, *times, f"{max(p.reward for p in curve):.3f}", f"{curve[-1].seconds:.0f}")
    Console(stderr=True, width=140).print(table)
    result = {
        "machine": machine(), "overrides": overrides or [], "seconds_to": reached,
        "curves": {name: [asdict(point) for point in curve] for name, curve in curves.items()},
    }  # fmt: skip
    print(json.dumps(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
