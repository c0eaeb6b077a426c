"""The table of all faults so far: `python -m benchmarks.chaos_table`, as Markdown, from `docs/results/chaos/`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.chaos_journal import RESULTS, read_lines

PHASES = ("sampling", "labelling", "training", "weight sync", "checkpoint", "resume")

Line = dict[str, Any]


def table(faults: Sequence[Line], runs: Sequence[Line]) -> str:
    """Role and fault by phase: survived of injected, mean seconds until a further step was done."""
    rows = [
        "| role | fault | " + " | ".join(PHASES) + " | s to be back | s to a further step | steps repeated | "
        "pairs sampled again | labels lost | counted twice |",
        "|---|---|" + "---|" * (len(PHASES) + 6),
    ]
    for role, kind in sorted({(line["role"], line["fault"]) for line in faults}):
        found = [line for line in faults if (line["role"], line["fault"]) == (role, kind)]
        phases = [_survived([line for line in found if line["moment"].partition(".")[0] == phase]) for phase in PHASES]
        means = [_mean(found, key) for key in ("back_seconds", "step_seconds", "repeated_steps", "resampled_pairs")]
        sums = [str(sum(line[key] for line in found)) for key in ("labels_lost", "counted_twice")]
        rows.append("| " + " | ".join([role, kind, *phases, *means, *sums]) + " |")
    return "\n".join([*rows, "", _sentence(faults, runs)])


def _sentence(faults: Sequence[Line], runs: Sequence[Line]) -> str:
    survived = sum(line["survived"] for line in faults)
    steps, trained = (sum(line[key] for line in runs) for key in ("steps", "trained"))
    wrong = sum(len(line[key]) for line in runs for key in ("wrong", "labels_lost", "counted_twice"))
    came_back = sum(bool(line["came_back"]) for line in faults)
    lingered = sum(bool(line["lingered"]) for line in faults)
    begun = len({(line["seed"], line["commit"], line["config"]) for line in faults})
    return (
        f"{len(faults)} faults in {begun} runs, {survived} survived; of stopped processes {came_back} were there to go "
        f"on, and {lingered} stayed although they had been replaced. {len(runs)} runs were stopped and resumed at "
        f"their end: {steps} steps, {trained} pairs trained, {wrong} things wrong with their books."
    )


def _survived(lines: Sequence[Line]) -> str:
    return f"{sum(line['survived'] for line in lines)} of {len(lines)}" if lines else "–"


def _mean(lines: Sequence[Line], key: str) -> str:
    known = [line[key] for line in lines if line[key] is not None]
    return f"{sum(known) / len(known):.1f}" if known else "–"


def main(
    results: Annotated[Path, typer.Argument(help="Folder of the lines.")] = RESULTS,
    config: Annotated[str, typer.Option(help="Of runs on this configuration.")] = "tiny.yaml",
    commit: Annotated[str, typer.Option(help="Only of commits that begin so.")] = "",
) -> None:
    """Print the table."""
    faults, runs = (
        [
            line
            for line in read_lines(results / name)
            if line["config"] == config and str(line["commit"]).startswith(commit)
        ]
        for name in ("faults.jsonl", "runs.jsonl")
    )
    typer.echo(table(faults, runs))


if __name__ == "__main__":
    typer.run(main)
