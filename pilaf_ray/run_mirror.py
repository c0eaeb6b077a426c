"""What a resumption on another machine needs, at ``checkpoint.mirror``: gathered beside the run, and brought back.

A copy of step k holds ``checkpoint/`` and ``run/``: the ledger as it was when the copy began, which is at step k
or later, the metrics, and the other files that a resumption reads. Resuming puts all of them back to step k.
"""

import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from pilaf_ray import build
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.checkpoint import checkpoint_files, step_folder
from pilaf_ray.engines.mirror_location import MirrorLocation
from pilaf_ray.engines.retention import RetentionPolicy
from pilaf_ray.errors import CheckpointError, MirrorError, RunFolderError
from pilaf_ray.pipeline.mirroring import CheckpointMirror
from pilaf_ray.pipeline.supervision import Report

LEDGER = "preferences.db"
_LINES = ("metrics.jsonl", "events.jsonl", "judge.jsonl")
_FILES = ("config.json", "prompts.json", "base.json", "access.json", "evaluations/*.json", "inbox/*.jsonl")


def open_mirror(config: RunConfig) -> MirrorLocation | None:
    """The run's folder at ``checkpoint.mirror``; raises ConfigError where it cannot be opened."""
    if config.checkpoint.mirror is None:
        return None
    return MirrorLocation(config.checkpoint.mirror, run=config.run.name)


def run_mirror(
    config: RunConfig, run: Path, *, scores: Callable[[], Mapping[int, float]], report: Report
) -> CheckpointMirror | None:
    """What copies the checkpoints of the run in ``run``; None where the configuration wants no copies."""
    location = open_mirror(config)
    if location is None:
        return None
    settings = config.checkpoint
    policy = RetentionPolicy(last=settings.keep_last, best=settings.keep_best, every=settings.keep_every)
    staging = run / "mirror.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    return CheckpointMirror(
        location,
        gather=lambda step: gather(run, step, staging / str(step), with_ledger=config.store.url is None),
        kept=lambda steps, newest, serving: policy.kept(steps, newest=newest, scores=scores(), serving=serving),
        done=lambda step: shutil.rmtree(staging / str(step), ignore_errors=True),
        report=report,
        seconds=settings.mirror_seconds,
    )


def gather(run: Path, step: int, staging: Path, *, with_ledger: bool) -> dict[str, Path]:
    """The files of a copy by name; those that change while the run goes on are copied to ``staging`` first.

    Raises:
        MirrorError: there is no room for them, or the ledger cannot be read.
    """
    try:
        checkpoint = step_folder(run / "checkpoints", step)
        files = {f"checkpoint/{name}": checkpoint / name for name in checkpoint_files(checkpoint)}
        staging.mkdir(parents=True, exist_ok=True)
        if with_ledger:
            files[f"run/{LEDGER}"] = snapshot(run / LEDGER, staging / LEDGER)
        for name in _LINES:
            if (run / name).is_file():
                text = (run / name).read_bytes()
                # A line that is just being written is left out.
                (staging / name).write_bytes(text[: text.rfind(b"\n") + 1])
                files[f"run/{name}"] = staging / name
        for pattern in _FILES:
            for path in run.glob(pattern):
                name = str(path.relative_to(run))
                (staging / name).parent.mkdir(exist_ok=True)
                files[f"run/{name}"] = Path(shutil.copyfile(path, staging / name))
    except (OSError, sqlite3.Error) as error:
        raise MirrorError(f"what belongs to step {step} cannot be gathered ({error})") from error
    return dict(sorted(files.items()))


def snapshot(ledger: Path, target: Path) -> Path:
    """Copy a SQLite ledger beside its writer, as it is between two transactions."""
    target.unlink(missing_ok=True)
    with (
        closing(sqlite3.connect(f"{ledger.resolve().as_uri()}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)
    return target


def require_new(config: RunConfig) -> None:
    """Raises RunFolderError where the location holds a run of that name, which a new one would mix with."""
    location = open_mirror(config)
    if location is not None and location.steps():
        raise RunFolderError(f"{location.name} holds a run already: add --resume, or choose another run.name")


def is_resumable(config: RunConfig, run: Path) -> bool:
    """Whether there is a run to go on with, here or at the location."""
    if (run / "config.json").exists():
        return True
    location = open_mirror(config)
    return location is not None and bool(location.steps())


def fetch_run(config: RunConfig, run: Path) -> int | None:
    """Bring a run whose folder is not there back from its newest sound copy; returns its step.

    Raises:
        CheckpointError: there are copies, and none is sound.
        MirrorError: the location does not answer.
    """
    location = open_mirror(config)
    if location is None or (run / "config.json").exists():
        return None
    scratch = run / "checkpoints" / "tmp.fetched"
    steps = location.steps()
    try:
        for step in reversed(steps):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            served = build.build_schedule(config, start_step=step).served_version(step)
            whole = location.fetch(step, scratch / "newest")
            if whole and 0 < served < step:
                whole = served in steps and location.fetch(served, scratch / "served", below="checkpoint/")
            if whole:
                _put(scratch, run, {"newest": step, "served": served})
                return step
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if steps:
        raise CheckpointError(f"{location.name}: no copy of a checkpoint is sound, of steps {steps}")
    return None


def _put(scratch: Path, run: Path, steps: Mapping[str, int]) -> None:
    """Move what was fetched to where a run has it; the configuration last, because it makes the folder a run's."""
    for name, step in steps.items():
        if (scratch / name / "checkpoint").is_dir():
            final = step_folder(run / "checkpoints", step)
            shutil.rmtree(final, ignore_errors=True)
            (scratch / name / "checkpoint").rename(final)
    for leftover in run.glob(f"{LEDGER}*"):
        leftover.unlink()
    files = sorted(path for path in (scratch / "newest" / "run").rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        target = run / path.relative_to(scratch / "newest" / "run")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
