"""The folder of one run, owned by one process at a time."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pilaf_ray.errors import PromptError, RunFolderError
from pilaf_ray.pipeline.scaling import NAME as SCALE_REQUEST

KEPT_ATTEMPTS = 20
"""So many attempts' logs stay before the new one's; a run that restarts for weeks does not fill its disk with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Paths of a run; see docs/architecture.md."""

    path: Path
    attempt: int

    @property
    def metrics(self) -> Path:
        """One JSON object a learner step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Starts, weight versions, evaluations, checkpoints."""
        return self.path / "events.jsonl"

    @property
    def trace(self) -> Path:
        """Every call to a role, where ``logging.trace`` is set."""
        return self.path / "trace.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints by step."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Logs of this attempt, one file a role."""
        return self.path / "logs" / f"attempt_{self.attempt}"

    @property
    def prompts(self) -> Path:
        """What identifies the prompts that the run began with."""
        return self.path / "prompts.json"

    @property
    def report(self) -> Path:
        """The final report."""
        return self.path / "report"


def keep_prompts(folder: RunFolder, *, path: str, count: int, fingerprint: str) -> None:
    """Write down which prompts a run has; raises PromptError where it began with others.

    Pairs are planned by position in an order of the prompts, so with others a resumed run would ask some twice.
    """
    if not folder.prompts.is_file():
        folder.prompts.write_text(json.dumps({"path": path, "count": count, "fingerprint": fingerprint}))
        return
    before = json.loads(folder.prompts.read_text())
    if before["fingerprint"] != fingerprint:
        raise PromptError(
            f"{path}: not the prompts that the run began with ({before['count']} then, {count} now): put them back, "
            "or start a new run"
        )


@contextmanager
def open_run_folder(path: Path, *, config_json: str, resume: bool) -> Iterator[RunFolder]:
    """Create or reopen the folder and hold its lock; the lock dies with the process.

    Raises:
        RunFolderError: in use, already there without ``resume``, or missing with it.
    """
    config_file = path / "config.json"
    if resume and not config_file.exists():
        raise RunFolderError(f"{path} holds no run to resume: start it without --resume")
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(f"{path} is in use by a running job: stop it, or choose another run.name") from error
        if config_file.exists() and not resume:
            raise RunFolderError(f"{path} holds a run already: add --resume, or choose another run.name")
        config_file.write_text(json.dumps(json.loads(config_json), indent=2))
        # What somebody asked an earlier attempt for.
        (path / SCALE_REQUEST).unlink(missing_ok=True)
        attempts = sorted(int(p.name.removeprefix("attempt_")) for p in (path / "logs").glob("attempt_*"))
        # The first stays, too: it may know the first cause of what the others suffer from.
        for number in attempts[1 : -(KEPT_ATTEMPTS - 1)]:
            shutil.rmtree(path / "logs" / f"attempt_{number}")
        folder = RunFolder(path=path, attempt=1 + max(attempts, default=0))
        folder.logs.mkdir(parents=True)
        latest = path / "logs" / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(folder.logs.name)
        folder.checkpoints.mkdir(exist_ok=True)
        yield folder


def is_owned(path: Path) -> bool:
    """Whether a process has the run in ``path`` open."""
    if not (path / ".lock").is_file():
        return False
    with (path / ".lock").open() as lock:
        try:
            # Shared, so that two who ask at once do not see each other.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
