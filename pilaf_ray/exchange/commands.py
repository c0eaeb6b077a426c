"""``pilaf-ray pairs`` for the command line."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pilaf_ray.errors import RunFolderError
from pilaf_ray.types import PairState

LABELLED = (PairState.LABELED, PairState.TRAINED)
pairs = typer.Typer(no_args_is_help=True, help="Pairs out of a run, and labels into it.")


class ExportFormat(StrEnum):
    """What is written."""

    PREFERENCE = "preference"
    ARGILLA = "argilla"
    LABEL_STUDIO = "label-studio"


@pairs.command("export")
def export_pairs(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/quickstart.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".jsonl or .parquet; .json for labelling tools.")],
    to: Annotated[
        ExportFormat, typer.Option(help="Preference data (TRL), or an import file of a tool.")
    ] = ExportFormat.PREFERENCE,
    waiting: Annotated[
        bool, typer.Option("--waiting", help="Pairs that wait for a label instead of labelled ones.")
    ] = False,
    ties: Annotated[bool, typer.Option("--ties", help="Preference data with ties.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Leave out pairs whose answers were dropped.")] = False,
) -> None:
    """Write pairs for other tools."""
    from pilaf_ray.console.app import open_reader
    from pilaf_ray.exchange.exporting import export
    from pilaf_ray.exchange.records import pair_records

    reader = open_reader(run, _config(run))
    states = (PairState.SAMPLED,) if waiting else LABELLED
    count = export(pair_records(reader.database, states=states, kept=kept), output, to=to.value, ties=ties)
    reader.close()
    typer.echo(f"{count} pairs: {output}")


@pairs.command("import")
def import_labels(
    run: Annotated[Path, typer.Argument(help="Run folder whose oracle asks people.")],
    labels: Annotated[Path, typer.Argument(help=".jsonl or .parquet with pair_id and preference, or a tool's .json.")],
    annotator: Annotated[str, typer.Option(help="Who gave the labels, where the file does not say.")] = "import",
) -> None:
    """Hand labels to a run; one that is under way takes them in within a second, another when it goes on."""
    from pilaf_ray.exchange.importing import read_votes
    from pilaf_ray.store.inbox import put_votes

    kind = _config(run)["oracle"]["type"]
    if kind not in ("human", "mixture"):
        raise RunFolderError(f"{run}: its oracle.type is {kind}, which asks nobody; labels go to human or mixture")
    votes = read_votes(labels, annotator=annotator)
    put_votes(run, votes)
    typer.echo(f"{len(votes)} labels are handed to {run}; those of pairs that no longer wait are kept as late")


def _config(run: Path) -> dict[str, dict[str, str]]:
    if not (run / "config.json").is_file():
        raise RunFolderError(f"{run} is not a run folder: it has no config.json; give e.g. runs/quickstart")
    config: dict[str, dict[str, str]] = json.loads((run / "config.json").read_text())
    return config


def add_commands(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.add_typer(pairs, name="pairs")
