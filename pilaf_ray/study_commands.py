"""The commands that study samplers."""

from pathlib import Path
from typing import Annotated

import typer

from pilaf_ray.errors import ConfigError


def add_study_commands(app: typer.Typer) -> None:
    """Add ``compare`` and ``align`` to the command line."""
    app.command()(compare)
    app.command()(align)


def compare(
    config: Annotated[Path, typer.Argument(help="YAML configuration that all runs share.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. evaluation.prompts=128")] = None,
    samplers: Annotated[
        str, typer.Option(help="Names, with settings where they matter: vanilla,pilaf,best_of_n(n=4;scorer=oracle)")
    ] = "vanilla,hybrid,best_of_n,pilaf",
    seeds: Annotated[str, typer.Option(help="Seeds, e.g. 0,1,2")] = "0,1,2",
    budget: Annotated[str, typer.Option(help="labels=2000, or tokens, steps or seconds")] = "labels=2000",
    warm_start: Annotated[
        int, typer.Option(min=0, help="Labels of one vanilla run that all runs start from; 0: from model.policy.")
    ] = 0,
    baseline: Annotated[str | None, typer.Option(help="What others are compared with; vanilla where it runs.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of runs and report.")] = Path("comparison"),
) -> None:
    """Run every sampler with every seed under one budget; a stopped comparison goes on where it was."""
    from pilaf_ray.comparison_run import run_comparison

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds: '{seeds}' is not a list of whole numbers such as 0,1,2") from error
    page = run_comparison(
        config,
        samplers=[name.strip() for name in samplers.split(",")],
        seeds=numbers,
        budget=budget,
        output=output,
        overrides=overrides or [],
        warm_start=warm_start,
        baseline=baseline,
    )
    typer.echo(f"report: {page}")


def align(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoint of one or a model folder.")],
    samplers: Annotated[str, typer.Option(help="Of vanilla, hybrid, pilaf and t_pilaf.")] = (
        "vanilla,hybrid,pilaf,t_pilaf"
    ),
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts.")] = 16,
    samples: Annotated[int, typer.Option(min=4, help="Responses a prompt and mixing coefficient.")] = 16,
    parameters: Annotated[
        str | None, typer.Option(help="Regular expression of parameters; the last block's when left out.")
    ] = None,
    projections: Annotated[int, typer.Option(min=1, help="Numbers that a gradient is projected to.")] = 2**14,
    config: Annotated[
        Path | None, typer.Option(help="Prompts, oracle and reference; those of the run if left out.")
    ] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")] = Path("alignment.json"),
) -> None:
    """How well each sampler's expected DPO gradient points where J grows."""
    from rich.console import Console

    from pilaf_ray import alignment_run
    from pilaf_ray.evaluation.json_files import write_json

    console = Console()
    found = alignment_run.measure_alignment(
        checkpoint,
        samplers=[name.strip() for name in samplers.split(",")],
        prompts=prompts,
        samples=samples,
        parameters=parameters,
        projections=projections,
        config=config,
        overrides=override or [],
        console=console,
    )
    write_json(found, output)
    console.print(alignment_run.table(found))
    console.print(f"all estimates: {output}", markup=False)
