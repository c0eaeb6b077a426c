"""Seconds of training to a held-out reward, beside TRL: `python -m benchmarks.time_to_reward configs/quickstart.yaml`.

pilaf_ray's asynchronous run and TRL's OnlineDPOTrainer (with our settings of glibc) take the same configuration in
turn, as in `benchmarks.end_to_end`; both prefer the response with the larger reward, as TRL does. Every so many steps
the reward of one response to each held-out prompt is measured. A reward between two measurements is reached at the
moment between them that a straight line gives. Starting and loading are on nobody's clock; ours has what the
evaluations cost the run, which goes on meanwhile, and TRL's has not.

``--synchronous`` adds ours without staleness, one role after the other. With ``--rounds`` all of them run again with
the next seeds, and the table has medians and, where they differ, the range; a reward that a round does not reach counts
as reached after all others.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.chaos_journal import read_lines
from benchmarks.end_to_end import ASYNCHRONOUS, SYNCHRONOUS, TRL, run_to_its_end, run_trl
from benchmarks.machine import machine
from benchmarks.options import several
from pilaf_ray.config.loader import load_config

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Every system with one seed."""

    seed: int
    curves: Mapping[str, Sequence[Point]]

    def reached(self, rewards: Sequence[float]) -> dict[str, dict[str, float | None]]:
        """Seconds to each reward, by system."""
        return {
            name: {f"{reward:g}": seconds_to(reward, curve) for reward in rewards}
            for name, curve in self.curves.items()
        }

    def told(self, rewards: Sequence[float]) -> dict[str, Any]:
        """The round for the JSON, without its seed."""
        curves = {name: [asdict(point) for point in curve] for name, curve in self.curves.items()}
        return {"seconds_to": self.reached(rewards), "curves": curves}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure over the rounds; None: never."""

    median: float | None
    least: float | None
    most: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """Of the rounds' ``values``; never comes after every moment."""
        ordered = sorted(math.inf if value is None else value for value in values)
        found = (statistics.median(ordered), ordered[0], ordered[-1])
        median, least, most = (None if math.isinf(value) else value for value in found)
        return cls(median=median, least=least, most=most)

    def shown(self, digits: int) -> str:
        """The median, and the range where there is one."""
        median, least, most = (
            "–" if value is None else f"{value:.{digits}f}" for value in (self.median, self.least, self.most)
        )
        return median if least == most else f"{median} ({least} to {most})"


def over_the_rounds(rounds: Sequence[Round], rewards: Sequence[float]) -> dict[str, dict[str, Spread]]:
    """By system, the seconds to each reward."""
    found = [one.reached(rewards) for one in rounds]
    return {
        name: {reward: Spread.of([one[name][reward] for one in found]) for reward in found[0][name]}
        for name in found[0]
    }


def run_round(config: Path, words: Sequence[str], *, seed: int, steps: int, synchronous: bool) -> Round:
    """The systems, one after the other."""
    seeded = [*words, f"run.seed={seed}"]
    runs = {ASYNCHRONOUS: seeded}
    if synchronous:
        runs[SYNCHRONOUS] = [*seeded, "pipeline.max_staleness_steps=0"]
    curves = {}
    for name, own in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            curves[name] = pilaf_ray_curve(config, own, Path(folder))
    curves[TRL] = trl_curve(config, seeded, steps)
    return Round(seed=seed, curves=curves)


def show(rounds: Sequence[Round], rewards: Sequence[float]) -> None:
    """The table."""
    table = Table("system", *(f"s to {reward:g}" for reward in rewards), "highest", "s in all")
    for name, reached in over_the_rounds(rounds, rewards).items():
        curves = [one.curves[name] for one in rounds]
        highest = Spread.of([max(point.reward for point in curve) for curve in curves])
        seconds = Spread.of([curve[-1].seconds for curve in curves])
        table.add_row(name, *(one.shown(0) for one in reached.values()), highest.shown(3), seconds.shown(0))
    Console(stderr=True, width=140).print(table)


def result(rounds: Sequence[Round], rewards: Sequence[float]) -> dict[str, Any]:
    """For the JSON: the one round, or medians and ranges before all of them."""
    if len(rounds) == 1:
        return rounds[0].told(rewards)
    spreads = over_the_rounds(rounds, rewards)
    return {
        "median": {name: {key: one.median for key, one in found.items()} for name, found in spreads.items()},
        "range": {name: {key: [one.least, one.most] for key, one in found.items()} for name, found in spreads.items()},
        "rounds": [{"seed": one.seed, **one.told(rewards)} for one in rounds],
    }


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each.")] = 30,
    every: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 5,
    rewards: Annotated[str, typer.Option(help="Held-out rewards, separated by commas.")] = "1.75,2,2.25,2.5",
    rounds: Annotated[int, typer.Option(min=1, help="Of all of them, each with the next seed.")] = 1,
    synchronous: Annotated[bool, typer.Option("--synchronous", help="Also ours without staleness.")] = False,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print a table and one line of JSON."""
    wanted = several(rewards, float)
    words = [*(overrides or []), f"evaluation.every_steps={every}", f"run.max_steps={steps}", ARGMAX]
    first = load_config(config, words).run.seed
    found = [
        run_round(config, words, seed=first + number, steps=steps, synchronous=synchronous) for number in range(rounds)
    ]
    show(found, wanted)
    told = {"machine": machine(), "overrides": overrides or [], **result(found, wanted)}
    print(json.dumps(told))
    if file is not None:
        file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
