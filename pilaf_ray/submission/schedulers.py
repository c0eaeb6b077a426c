"""Schedulers by their own command-line clients: Slurm, KubeRay, SkyPilot."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pilaf_ray.errors import ClusterError
from pilaf_ray.submission.job import Job, render, write_config


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """One job, in the scheduler's own words."""

    job_id: str
    name: str
    state: str


class Scheduler(Protocol):
    """What every target can do."""

    def submit(self, job: Job) -> str:
        """Queue ``job``; returns the id that the other calls take."""
        ...

    def jobs(self) -> list[JobStatus]:
        """Jobs of this project, newest last."""
        ...

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        """Hand the driver's output to ``write``, to its end if asked to follow."""
        ...

    def stop(self, job_id: str) -> None:
        """Ask the job to save and end."""
        ...


def run_client(command: Sequence[str], *, text: str | None = None) -> str:
    """Output of a scheduler's client; a client that is missing or refuses is one line of ClusterError."""
    if shutil.which(command[0]) is None:
        raise ClusterError(
            f"there is no '{command[0]}' on this machine: submit where it is installed, "
            "or add --dry-run to write the files and hand them over yourself"
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise ClusterError(f"{' '.join(command[:2])} refused: {reason}")
    return done.stdout


def missing_secrets(names: Sequence[str]) -> list[str]:
    """Those of ``submission.secrets`` that this environment does not hold."""
    return [name for name in names if not os.environ.get(name)]


class Slurm:
    """``sbatch`` and its neighbours."""

    def submit(self, job: Job) -> str:
        write_config(job)
        ((name, text),) = render(job, "slurm").items()
        script = job.config_path.with_name(f"{job.name}-{name}")
        script.write_text(text)
        # The job gets this shell's environment, secrets with it, as Slurm does by default; nothing is written.
        return run_client(["sbatch", "--parsable", str(script)]).strip().split(";")[0]

    def jobs(self) -> list[JobStatus]:
        lines = run_client(["squeue", "--me", "--noheader", "--format=%i|%j|%T"]).splitlines()
        rows = [line.split("|") for line in lines]
        return [JobStatus(job_id=i, name=n, state=s) for i, n, s in rows if n.startswith("pilaf-")]

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        shown = run_client(["scontrol", "show", "job", job_id])
        path = next((word.removeprefix("StdOut=") for word in shown.split() if word.startswith("StdOut=")), None)
        if path is None or not Path(path).exists():
            raise ClusterError(f"job {job_id} has no output yet; its state is in 'pilaf-ray jobs --to slurm'")
        _stream(["tail", "-n", "+1", *(["--follow"] if follow else []), path], write)

    def stop(self, job_id: str) -> None:
        # Only the batch script is told; it saves, and frees the nodes itself.
        run_client(["scancel", "--batch", "--signal=USR1", job_id])


class KubeRay:
    """``kubectl`` on RayJob objects."""

    def __init__(self, namespace: str = "default") -> None:
        self._kubectl = ["kubectl", "--namespace", namespace]

    def submit(self, job: Job) -> str:
        ((_, text),) = render(job, "kuberay").items()
        run_client([*self._kubectl, "apply", "--filename", "-"], text=text)
        return job.name

    def jobs(self) -> list[JobStatus]:
        columns = "custom-columns=:metadata.name,:status.jobStatus,:status.jobDeploymentStatus"
        selector = "--selector=app.kubernetes.io/name=pilaf-ray"
        command = [*self._kubectl, "get", "rayjobs.ray.io", selector, "--no-headers", "--output", columns]
        rows = [line.split() for line in run_client(command).splitlines() if line.strip()]
        return [JobStatus(job_id=name, name=name, state=" ".join(state)) for name, *state in rows]

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        cluster = run_client(
            [*self._kubectl, "get", "rayjob", job_id, "--output", "jsonpath={.status.rayClusterName} {.status.jobId}"]
        ).split()
        if len(cluster) < 2:
            raise ClusterError(f"{job_id} has no cluster yet; its state is in 'pilaf-ray jobs --to kuberay'")
        selector = f"ray.io/cluster={cluster[0]},ray.io/node-type=head"
        head = run_client([*self._kubectl, "get", "pods", f"--selector={selector}", "--output", "name"]).strip()
        followed = ["--follow"] if follow else []
        _stream([*self._kubectl, "exec", head, "--", "ray", "job", "logs", *followed, cluster[1]], write)

    def stop(self, job_id: str) -> None:
        run_client([*self._kubectl, "delete", "rayjob", job_id])


class SkyPilot:
    """``sky jobs``: managed jobs, which start again after a preemption."""

    def submit(self, job: Job) -> str:
        ((name, text),) = render(job, "skypilot").items()
        write_config(job)
        task = job.config_path.with_name(f"{job.name}-{name}")
        task.write_text(text)
        secrets = [part for secret in job.config.submission.secrets for part in ("--secret", secret)]
        run_client(["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, *secrets, str(task)])
        return job.name

    def jobs(self) -> list[JobStatus]:
        lines = run_client(["sky", "jobs", "queue"]).splitlines()
        rows = [line.split() for line in lines if "pilaf-" in line]
        return [JobStatus(job_id=row[0], name=row[2], state=row[-1]) for row in rows]

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        _stream(["sky", "jobs", "logs", "--name", job_id, *([] if follow else ["--no-follow"])], write)

    def stop(self, job_id: str) -> None:
        run_client(["sky", "jobs", "cancel", "--yes", "--name", job_id])


def _stream(command: Sequence[str], write: Callable[[str], None]) -> None:
    if shutil.which(command[0]) is None:
        raise ClusterError(f"there is no '{command[0]}' on this machine")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                write(line.rstrip("\n"))
        finally:
            process.terminate()
