"""Slurm, by its own command-line clients."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pilaf_ray.errors import ClusterError
from pilaf_ray.submission.job import Job, render, write_config
from pilaf_ray.submission.schedulers import JobStatus, require_client, run_client

# A job in one of these has no script that runs.
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")
_ENDED_WELL = "COMPLETED"
_ENDED = (
    *(_ENDED_WELL, "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"),
)
# What Slurm's clients say when they cannot reach it, and what that means.
_SILENCES = {
    "Unable to contact slurm controller": "Slurm's controller does not answer; `scontrol ping` says whether it is up",
    "Could not establish a configuration source": (
        "this machine has no configuration of Slurm: submit from a login node, or let SLURM_CONF name the file"
    ),
}
# Nodes that are down today may be back tomorrow: such a job may wait.
_MAY_WAIT = "Required node not available"


class Slurm:
    """``sbatch`` and its neighbours.

    Args:
        poll_seconds: how often a job that is followed is asked for its state.
        sleep: waits that long.
    """

    def __init__(self, *, poll_seconds: float = 2.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self._poll_seconds = poll_seconds
        self._sleep = sleep

    def submit(self, job: Job) -> str:
        """Queue ``job``, unless Slurm says that it could never run; returns its id."""
        require_client("sbatch")
        write_config(job)
        ((name, text),) = render(job, "slurm").items()
        script = job.config_path.with_name(f"{job.name}-{name}")
        script.write_text(text)
        _require_possible(script)
        # The job gets this shell's environment, secrets with it, as Slurm does by default; nothing is written.
        return _ask(["sbatch", "--parsable", str(script)]).strip().split(";")[0]

    def jobs(self) -> list[JobStatus]:
        """This user's jobs that wait or run, and those that ended lately, oldest first."""
        command = ["squeue", "--me", "--states=all", "--sort=i", "--noheader", "--format=%i|%T|%r|%j"]
        rows = [line.split("|", 3) for line in _ask(command).splitlines()]
        return [
            JobStatus(job_id=i, name=name, state=state if reason == "None" else f"{state} ({reason})")
            for i, state, reason, name in rows
            if name.startswith("pilaf-")
        ]

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        """The output so far, or all of it; raises ClusterError if a followed job does not end well."""
        shown = _ask(["scontrol", "show", "job", job_id]).splitlines()
        path = next((Path(line.strip()[7:]) for line in shown if line.strip().startswith("StdOut=")), None)
        if path is None or not (follow or path.exists()):
            raise ClusterError(f"job {job_id} has no output yet; its state is in 'pilaf-ray jobs --to slurm'")
        if not follow:
            write(path.read_text(errors="replace").rstrip("\n"))
            return
        for line in self._lines(job_id, path):
            write(line)
        state = _state(job_id)
        if state != _ENDED_WELL:
            raise ClusterError(f"job {job_id} ended as {state}; its output is {path}")

    def _lines(self, job_id: str, path: Path) -> Iterator[str]:
        """Whole lines as they are written, until the job has ended; a job that is requeued has not."""
        position, ended = 0, False
        while not ended:
            # Asked first, so that what a job wrote last is read after its end is known.
            ended = _state(job_id) in _ENDED
            if path.exists():
                with path.open("rb") as file:
                    file.seek(position)
                    text = file.read()
                whole = len(text) if ended else text.rfind(b"\n") + 1
                position += whole
                yield from text[:whole].decode(errors="replace").splitlines()
            if not ended:
                self._sleep(self._poll_seconds)

    def stop(self, job_id: str) -> None:
        """A running job is asked to save and end; one that waits leaves the queue."""
        if _state(job_id) in _WAITING:
            # Nothing runs that could save, and a job that was preempted has saved.
            _ask(["scancel", job_id])
        else:
            # Only the batch script is told; it ends the driver, which saves, and frees the nodes itself.
            _ask(["scancel", "--batch", "--signal=USR1", job_id])


def _state(job_id: str) -> str:
    return _ask(["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}"]).strip()


def _require_possible(script: Path) -> None:
    """Raise ClusterError where no node that Slurm has could ever run ``script``.

    Without this a job that asks for too much waits for ever in many clusters (``EnforcePartLimits`` is off by default).
    """
    try:
        _ask(["sbatch", "--test-only", str(script)])
    except ClusterError as error:
        if _MAY_WAIT not in str(error):
            raise ClusterError(
                f"{error}; resources.nodes and submission.slurm say what is asked for, `sinfo` what there is"
            ) from error


def _ask(command: Sequence[str]) -> str:
    """Output of one of Slurm's clients; a Slurm that is out of reach is said in words."""
    try:
        return run_client(command)
    except ClusterError as error:
        for words, meaning in _SILENCES.items():
            if words in str(error):
                raise ClusterError(meaning) from error
        raise
