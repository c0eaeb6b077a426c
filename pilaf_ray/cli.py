"""The command line. Imports nothing heavy until a command needs it."""

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.console import commands as console_commands
from pilaf_ray.errors import GivenUpError, OracleError, PilafError, RoleLostError, WeightSyncError
from pilaf_ray.exchange import commands as exchange_commands
from pilaf_ray.scale_command import scale
from pilaf_ray.study_commands import add_study_commands
from pilaf_ray.submission import commands as submission_commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="About configurations.")
app.add_typer(config_app, name="config")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. run.seed=1")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of that name.")] = False,
    restartable: Annotated[
        bool, typer.Option("--restartable", help="Continue the run of that name if there is one, else start it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs and print the plan, start nothing.")
    ] = False,
) -> None:
    """Align a policy."""
    settings = load_config(config, overrides or [])
    if dry_run:
        from pilaf_ray.dry_run import print_plan

        print_plan(settings)
        return
    folder = Path(settings.run.folder) / settings.run.name
    if restartable and not resume:
        from pilaf_ray.run_mirror import is_resumable

        resume = is_resumable(settings, folder)
    from pilaf_ray.restarts import CHILD, run_restartable, start_controller

    if settings.run.restarts and CHILD not in os.environ:
        from pilaf_ray.build import supervision_policy
        from pilaf_ray.observability.alerts import Webhook

        with closing(Webhook(settings.guards.webhook, run=settings.run.name)) as webhook:
            code = run_restartable(
                start_controller([str(config), *(overrides or [])]), resume=resume, folder=folder,
                restarts=settings.run.restarts, policy=supervision_policy(settings), tell=webhook.send,
            )  # fmt: skip
        raise typer.Exit(code)
    from pilaf_ray.training_run import train as run

    run(settings, resume=resume)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, e.g. runs/quickstart")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page is written.")] = Path("report.html"),
    sample_pairs: Annotated[int, typer.Option(min=0, help="Labelled pairs shown of each run.")] = 4,
) -> None:
    """Write one self-contained HTML page about one run or several."""
    from pilaf_ray.evaluation.html_pages import write_page
    from pilaf_ray.evaluation.run_records import read_run
    from pilaf_ray.evaluation.run_report import run_report

    write_page(output, run_report([read_run(run, sample_pairs=sample_pairs) for run in runs]))
    typer.echo(f"report: {output}")


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Runs (their newest checkpoint), checkpoints step-… or model folders.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="Prompts, oracle and reference; those of the first run when left out.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. prompts.evaluation.path=builtin:reviews/final")
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=2, help="Held-out prompts.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses a prompt; r̂ is judged from 2 on.")] = 2,
    judge: Annotated[
        str | None, typer.Option(help="Oracle section (function, reward_model or judge) that says who wins, as YAML.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")] = Path("evaluation.json"),
) -> None:
    """Held-out reward, KL, J, win rates, length and diversity of checkpoints, with intervals."""
    from rich.console import Console

    from pilaf_ray import evaluation_run
    from pilaf_ray.evaluation.json_files import write_json

    console = Console()
    found = evaluation_run.evaluate(
        checkpoints, config=config, overrides=override or [], prompts=prompts, samples=samples, judge=judge,
        console=console,
    )  # fmt: skip
    write_json(found.as_json(), output)
    console.print(evaluation_run.table(found))
    console.print(f"all responses and estimates: {output}", markup=False)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run folder, e.g. runs/quickstart")],
    step: Annotated[int, typer.Option(min=1, help="The step to end with.")],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest difference of a loss.")] = 1e-6,
) -> None:
    """Execute learner steps again from checkpoint and ledger, and compare the losses; exit code 1 if they differ."""
    from pilaf_ray.replay import replay as execute

    steps = execute(run, step=step)
    for done in steps:
        gap = abs(done.replayed - done.recorded)
        typer.echo(f"step {done.step}: recorded {done.recorded:.8f}, replayed {done.replayed:.8f}, apart {gap:.1e}")
    if any(abs(done.replayed - done.recorded) > tolerance for done in steps):
        raise typer.Exit(1)


@app.command()
def sizing(
    config: Annotated[Path, typer.Argument(help="YAML configuration with resources.nodes.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. learner.ranks=8")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters, where model.lora does not say.")] = 16,
) -> None:
    """Print what a configuration takes on its cluster; models may be folders with nothing but a config.json."""
    from pilaf_ray.sizing import sizing as table

    typer.echo(table(load_config(config, overrides or []), rank=rank), nl=False)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration whose URLs of models are tried.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. model.policy=s3://b/m")] = None,
) -> None:
    """Say what this machine has and what fits; exit code 1 if something is to be done."""
    from pilaf_ray.doctor import print_report

    if not print_report(None if config is None else load_config(config, overrides or [])):
        raise typer.Exit(1)


@config_app.command("show")
def config_show(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. run.seed=1")] = None,
) -> None:
    """Print the configuration with overrides and defaults filled in."""
    typer.echo(load_config(config, overrides or []).model_dump_json(indent=2))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of configurations, for editors."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@config_app.command("docs")
def config_docs() -> None:
    """Print docs/configuration.md."""
    from pilaf_ray.config.reference import markdown

    typer.echo(markdown(), nl=False)


submission_commands.add_commands(app)
console_commands.add_commands(app)
exchange_commands.add_commands(app)
app.command()(scale)
add_study_commands(app)


def main() -> None:
    """Entry point: our own errors are one line on stderr; exit code 2 for what only the user can mend, else 3."""
    try:
        app()
    except PilafError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(3 if isinstance(error, RoleLostError | GivenUpError | WeightSyncError | OracleError) else 2)
