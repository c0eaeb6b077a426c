"""One steady-state step of a run, role by role, as a picture: ``python -m benchmarks.timeline``.

Runs a configuration for some steps with ``logging.trace`` and draws what happened between the beginning of one of
the learner's steps and the next. ``--trace FILE`` draws a run that is there already.
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine

ROOT = Path(__file__).parents[1]
STEP = "train_step"
# Of the learner's calls, in the order in which they are drawn.
COLOURS = {"train_step": "#0072B2", "publish": "#D55E00", "update_weights": "#E69F00"}
OTHER = "#7F7F7F"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call to a role; seconds on a common clock."""

    role: str
    name: str
    begin: float
    end: float


def read_trace(text: str) -> list[Call]:
    """The calls of a trace that have ended, in the order of their ends."""
    events = json.loads(text.strip().rstrip(",").removesuffix("]").rstrip(",") + "]")
    begun: dict[int, float] = {}
    calls = []
    for event in events:
        seconds = event["ts"] / 1e6
        if event["ph"] == "b":
            begun[event["id"]] = seconds
        else:
            begin = begun.pop(event["id"])
            calls.append(Call(role=event["cat"], name=event["name"], begin=begin, end=seconds))
    return calls


def window(calls: Sequence[Call], *, steps: int = 1) -> tuple[float, float]:
    """From the beginning of a step in the run's middle to that of the step ``steps`` later.

    Raises:
        ValueError: the run is too short.
    """
    starts = sorted({call.begin for call in calls if call.name == STEP and call.role.endswith("rank 0")})
    if len(starts) < steps + 3:
        raise ValueError(f"{len(starts)} steps are too few: the first and the last are not steady; run for more")
    first = (len(starts) - steps) // 2
    return starts[first], starts[first + steps]


def within(calls: Sequence[Call], begin: float, end: float) -> dict[str, list[Call]]:
    """The calls of each role that overlap the window, cut to it."""
    found: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.end > begin and call.begin < end:
            cut = Call(role=call.role, name=call.name, begin=max(call.begin, begin), end=min(call.end, end))
            found[call.role].append(cut)
    return dict(sorted(found.items()))


def busy_share(calls: Sequence[Call], begin: float, end: float) -> float:
    """Share of the window in which at least one of the calls was under way."""
    busy, reached = 0.0, begin
    for call in sorted(calls, key=lambda call: call.begin):
        busy += max(0.0, call.end - max(call.begin, reached))
        reached = max(reached, call.end)
    return busy / (end - begin)


def lanes(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls that overlap lie in different lanes; as few as can be."""
    found: list[list[Call]] = []
    for call in sorted(calls, key=lambda call: call.begin):
        free = next((lane for lane in found if lane[-1].end <= call.begin), None)
        if free is None:
            found.append([call])
        else:
            free.append(call)
    return found


def draw(calls: Sequence[Call], file: Path, *, steps: int, title: str) -> dict[str, float]:
    """The picture; returns each role's busy share."""
    from matplotlib.figure import Figure

    begin, end = window(calls, steps=steps)
    roles = within(calls, begin, end)
    rows = {role: lanes(found) for role, found in roles.items()}
    heights = [max(3, len(found)) for found in rows.values()]
    figure = Figure(figsize=(9, 0.9 + 0.13 * sum(heights)), layout="constrained")
    panels: Any = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=heights)
    shares = {role: busy_share(found, begin, end) for role, found in roles.items()}
    for panel, (role, found) in zip(panels[:, 0], rows.items(), strict=True):
        for lane, calls_in_lane in enumerate(found):
            for call in calls_in_lane:
                colour = COLOURS.get(call.name, OTHER)
                panel.barh(lane, call.end - call.begin, left=call.begin - begin, color=colour, edgecolor="white",
                           linewidth=0.3, height=1.0)  # fmt: skip
        panel.set_yticks([])
        panel.set_ylabel(f"{role}\n{100 * shares[role]:.0f} %", rotation=0, ha="right", va="center", fontsize=8)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[-1, 0].set_xlim(0, end - begin)
    panels[-1, 0].set_xlabel("seconds")
    figure.suptitle(title, fontsize=9)
    handles = [panels[0, 0].barh(0, 0, color=colour) for colour in (*COLOURS.values(), OTHER)]
    figure.legend(handles, [*COLOURS, "other calls"], loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    return shares


def drawn(calls: Sequence[Call], *, steps: int) -> dict[str, list[dict[str, str | float]]]:
    """What :func:`draw` shows: the calls of each role, in seconds since the window began."""
    begin, end = window(calls, steps=steps)
    return {
        role: [{"name": c.name, "begin": round(c.begin - begin, 4), "end": round(c.end - begin, 4)} for c in found]
        for role, found in within(calls, begin, end).items()
    }


def main(
    config: Annotated[Path, typer.Argument(help="What is run.")] = ROOT / "configs/quickstart.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the run.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are drawn.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A trace.json; nothing is run then.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The picture.")] = ROOT / "docs/performance/timeline.png",
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON, with what is drawn.")] = None,
) -> None:
    """Draw one steady-state step and print how busy each role was in it."""
    with tempfile.TemporaryDirectory() as folder:
        if trace is None:
            words = ["run.max_steps=10", f"run.folder={folder}", "run.name=timeline", "logging.trace=true"]
            command = [sys.executable, "-m", "pilaf_ray", "train", str(config), *words, *(overrides or [])]
            subprocess.run(command, check=True, stdout=sys.stderr)
            trace = Path(folder) / "timeline/trace.json"
        calls = read_trace(trace.read_text())
    try:
        window(calls, steps=steps)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    shares = draw(calls, output, steps=steps, title=f"{steps} steady-state step(s) of {config.name}")
    begin, end = window(calls, steps=steps)
    figures = {role: round(share, 3) for role, share in shares.items()}
    told = {"seconds": round(end - begin, 2), "busy": figures, "machine": machine()}
    typer.echo(json.dumps(told, indent=1))
    if file is not None:
        of = {"overrides": overrides or [], "steps": steps, "calls": drawn(calls, steps=steps)}
        file.write_text(json.dumps({**told, **of}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
