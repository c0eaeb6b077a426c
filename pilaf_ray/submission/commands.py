"""``pilaf-ray submit``, ``jobs``, ``logs`` and ``stop``."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilaf_ray.config.loader import load_config
from pilaf_ray.errors import ClusterError

if TYPE_CHECKING:
    from pilaf_ray.submission.job import Job
    from pilaf_ray.submission.schedulers import Scheduler


class Target(StrEnum):
    """Where a run can be handed over."""

    ray = "ray"
    slurm = "slurm"
    kuberay = "kuberay"
    skypilot = "skypilot"


To = Annotated[Target, typer.Option("--to", help="Scheduler.")]
Address = Annotated[str | None, typer.Option(help="Ray: address of the dashboard, else RAY_API_SERVER_ADDRESS.")]
Namespace = Annotated[str, typer.Option(help="KubeRay: namespace.")]


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (submit, jobs, logs, stop):
        app.command()(command)


def submit(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. run.seed=1")] = None,
    to: To = Target.ray,
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder that goes with the job; relative paths start here.")
    ] = Path(),
    follow: Annotated[bool, typer.Option("--follow", help="Stay and show the output until the job ends.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print what would be handed over.")] = False,
) -> None:
    """Hand a run to a scheduler; submitted again, it goes on where it stopped."""
    from pilaf_ray.submission.job import check, job_memory_warnings, make_job, render
    from pilaf_ray.submission.kuberay import room_warnings

    job = make_job(load_config(config, overrides or []), working_dir=working_dir, target=to)
    check(job, to)
    for line in (*job_memory_warnings(job), *(room_warnings(job) if to is Target.kuberay else ())):
        typer.echo(f"warning: {line}", err=True)
    if to is Target.ray and (names := job.config.submission.secrets):
        typer.echo(f"note: {', '.join(names)} must be in the environment of `ray start` on the nodes", err=True)
    if dry_run:
        if to is Target.ray:
            _show_placement(job, address)
        shown = {"command": job.entrypoint} if to is Target.ray else render(job, to)
        for text in shown.values():
            typer.echo(text)
        return
    scheduler = _scheduler(to, address, job.config.submission.kubernetes.namespace)
    job_id = scheduler.submit(job)
    typer.echo(f"submitted {job_id}; run folder {job.config.run.folder}/{job.config.run.name}")
    typer.echo(f"follow it with: pilaf-ray logs {job_id} --to {to}{_where(job, to, address)} --follow")
    if follow:
        scheduler.logs(job_id, follow=True, write=typer.echo)


def jobs(to: To = Target.ray, address: Address = None, namespace: Namespace = "default") -> None:
    """List this project's jobs."""
    for status in _scheduler(to, address, namespace).jobs():
        typer.echo(f"{status.job_id}\t{status.state}\t{status.name}")


def logs(
    job: Annotated[str, typer.Argument(help="Id, as `submit` and `jobs` print it.")],
    to: To = Target.ray,
    address: Address = None,
    namespace: Namespace = "default",
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the job ends.")] = False,
) -> None:
    """Show a job's output."""
    _scheduler(to, address, namespace).logs(job, follow=follow, write=typer.echo)


def stop(
    job: Annotated[str, typer.Argument(help="Id, as `submit` and `jobs` print it.")],
    to: To = Target.ray,
    address: Address = None,
    namespace: Namespace = "default",
) -> None:
    """Ask a job to save and end."""
    _scheduler(to, address, namespace).stop(job)
    typer.echo(f"told {job} to stop; what it saved is continued by submitting it again")


def _show_placement(job: "Job", address: str | None) -> None:
    """Print where the roles would go on the nodes of the cluster, if it can be asked.

    Raises:
        PlacementError: they do not fit, as a submission would say.
    """
    from pilaf_ray.actors.jobs import RayJobs

    try:
        plan = RayJobs(address).plan(job)
    except ClusterError as error:
        typer.echo(f"note: whether the roles fit is not checked: {error}", err=True)
        return
    for line in plan.lines():
        typer.echo(line)
    plan.require()


def _where(job: "Job", to: Target, address: str | None) -> str:
    """The options without which `logs` and `stop` would look elsewhere."""
    if to is Target.ray and address:
        return f" --address {address}"
    namespace = job.config.submission.kubernetes.namespace
    return f" --namespace {namespace}" if to is Target.kuberay and namespace != "default" else ""


def _scheduler(to: Target, address: str | None, namespace: str) -> "Scheduler":
    from pilaf_ray.submission.kuberay import KubeRay
    from pilaf_ray.submission.schedulers import SkyPilot
    from pilaf_ray.submission.slurm import Slurm

    match to:
        case Target.ray:
            from pilaf_ray.actors.jobs import RayJobs

            return RayJobs(address)
        case Target.slurm:
            return Slurm()
        case Target.kuberay:
            return KubeRay(namespace)
        case _:
            return SkyPilot()
