"""Schedulers by their own command-line clients: SkyPilot here, Slurm and KubeRay in modules of their own."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pilaf_ray.errors import ClusterError
from pilaf_ray.submission.job import Job, render


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


ANSWER_SECONDS = 120.0
"""Deadline of a scheduler's client."""
SKY_SECONDS = 1800.0
"""SkyPilot's first job waits for the machine of its controller."""


def run_client(command: Sequence[str], *, text: str | None = None, seconds: float = ANSWER_SECONDS) -> str:
    """Output of a scheduler's client.

    Raises:
        ClusterError: in one line, the client is missing, refuses, or does not answer within ``seconds``.
    """
    require_client(command[0])
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{' '.join(command[:2])} did not answer within {seconds:g} s") from error
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise ClusterError(f"{' '.join(command[:2])} refused: {reason}")
    return done.stdout


def require_client(name: str) -> None:
    """Raise ClusterError where there is no such client on this machine."""
    if shutil.which(name) is None:
        raise ClusterError(
            f"there is no '{name}' on this machine: submit where it is installed, "
            "or add --dry-run to print the files and hand them over yourself"
        )


_LOGS_SHOWN = (0, 100, 101, 103)
"""Exit codes of ``sky jobs logs`` that tell how the job is: well, failed, not at its end, cancelled."""


class SkyPilot:
    """``sky jobs``: managed jobs, which start again after a preemption."""

    def submit(self, job: Job) -> str:
        require_client("sky")
        ((name, text),) = render(job, "skypilot").items()
        secrets = [part for secret in job.config.submission.secrets for part in ("--secret", secret)]
        with tempfile.TemporaryDirectory() as folder:
            task = Path(folder) / name
            task.write_text(text)
            command = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, *secrets, str(task)]
            run_client(command, seconds=SKY_SECONDS)
        return job.name

    def jobs(self) -> list[JobStatus]:
        rows = json.loads(run_client(["sky", "jobs", "queue", "--output", "json"]))
        names = [(row["job_name"] or "", row["status"]) for row in reversed(rows)]
        return [JobStatus(job_id=name, name=name, state=state) for name, state in names if name.startswith("pilaf-")]

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        command = ["sky", "jobs", "logs", "--name", job_id, *([] if follow else ["--no-follow"])]
        stream_client(command, write, fine=(0,) if follow else _LOGS_SHOWN)

    def stop(self, job_id: str) -> None:
        # Graceful: what the run saved reaches the bucket first.
        run_client(["sky", "jobs", "cancel", "--yes", "--graceful", "--name", job_id], seconds=SKY_SECONDS)


def stream_client(command: Sequence[str], write: Callable[[str], None], *, fine: Collection[int] = (0,)) -> None:
    """Hand each line that a scheduler's client prints to ``write``, as it comes.

    Raises:
        ClusterError: the client is missing, or its exit code is none of ``fine``, as when a followed job fails.
    """
    require_client(command[0])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                write(line.rstrip("\n"))
            code = process.wait()
        finally:
            process.terminate()
    if code not in fine:
        called = " ".join(command[:2])
        raise ClusterError(f"{called} ended with exit code {code}: the job failed, or its output is gone")
