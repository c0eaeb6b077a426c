"""``pilaf-ray scale`` for the command line."""

from pathlib import Path
from typing import Annotated

import typer

from pilaf_ray.errors import ConfigError, RunFolderError
from pilaf_ray.pipeline.scaling import ask_for_generators
from pilaf_ray.run_folder import is_owned


def scale(
    run: Annotated[Path, typer.Argument(help="Folder of a run that is under way, e.g. runs/quickstart.")],
    wanted: Annotated[str, typer.Argument(help="generators=4")],
) -> None:
    """Give a running run more or fewer generators."""
    count = wanted_generators(wanted)
    if not is_owned(run):
        raise RunFolderError(f"{run} is no run that is under way: start it, or set generation.replicas")
    ask_for_generators(run, count)
    typer.echo(f"asked for {count} generators; {run / 'events.jsonl'} tells what becomes of it")


def wanted_generators(text: str) -> int:
    """The number in ``generators=4``; raises ConfigError."""
    role, _, number = text.partition("=")
    if role != "generators" or not number.isdecimal():
        raise ConfigError(f"'{text}': write generators=4, say; other roles keep their number")
    if int(number) == 0:
        raise ConfigError("a pool with 0 generators samples nothing: give 1 or more, or stop the run with Ctrl-C")
    return int(number)
