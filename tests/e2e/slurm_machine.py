"""A Slurm of one machine, for tests: started by scripts/local_slurm.sh, asked by its own clients."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 90
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def why_not() -> str:
    """Why this machine cannot have one; empty where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"no {', '.join(missing)} on this machine (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """A job as Slurm shows it."""

    state: str
    reason: str
    restarts: int
    """How often it was put back into the queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmMachine:
    """The cluster, and a shell in which it and this environment's Python are found."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        """Output of one of Slurm's clients."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def pilaf(self, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """``pilaf-ray WORDS`` with that folder as the current one."""
        command = [sys.executable, "-m", "pilaf_ray", *words]
        environment = {**self.environment, **variables}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def job(self, job_id: str) -> SlurmJob:
        """What ``scontrol`` shows of it."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job_id).split()
        shown = dict(word.split("=", 1) for word in words if "=" in word)
        return SlurmJob(state=shown["JobState"], reason=shown["Reason"], restarts=int(shown["Restarts"]))


@contextmanager
def slurm_machine() -> Iterator[SlurmMachine]:
    """Munge, a controller and one node; ended with all their jobs."""
    # Sockets have short names, so not in pytest's folders.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    environment = {**kept, "PYTHONPATH": str(ROOT), "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    ports = {"SLURM_PORT": str(_two_free_ports()), "GRACE_SECONDS": str(GRACE_SECONDS)}
    script = ["bash", str(ROOT / "scripts" / "local_slurm.sh")]
    try:
        subprocess.run([*script, "start", str(folder)], env={**environment, **ports}, check=True, timeout=60)
        yield SlurmMachine(folder=folder, environment=environment)
    finally:
        subprocess.run([*script, "stop", str(folder)], env=environment, check=False, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def _two_free_ports() -> int:
    """A port that is free together with the one after it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
