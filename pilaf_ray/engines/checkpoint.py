"""Atomic checkpoints: temporary folder, sync, manifest, rename, then the pointer."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from pilaf_ray.errors import CheckpointError

_MANIFEST = "manifest.json"


class CheckpointStore:
    """Checkpoints ``step-000010`` in one folder, the newest ``keep_last`` of them."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        self._folder = folder
        for leftover in folder.glob("tmp.*"):
            shutil.rmtree(leftover)
        self._keep_last = keep_last

    async def write(self, step: int, writer: Callable[[Path], Awaitable[None]], *, keep: int | None = None) -> Path:
        """Let ``writer`` fill a folder, then publish it; a failure leaves the others intact.

        The checkpoint of step ``keep`` is not removed, however old it is.
        """
        temporary = self._folder / f"tmp.{step}"
        final = self._folder / f"step-{step:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            await writer(temporary)
            self._seal(step, temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._point(final)
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise CheckpointError(
                f"checkpoint of step {step} in {self._folder}: {why}; earlier checkpoints are intact, "
                "make room and continue with --resume"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._all()[: -self._keep_last]:
            if _step(old) != keep:
                shutil.rmtree(old)
        return final

    def latest(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest checkpoint that verifies."""
        for folder in reversed(self._all()):
            if self._verifies(folder):
                return _step(folder), folder
        return None

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of ``step`` that verifies."""
        return self._verifies(self._folder / f"step-{step:06d}")

    def at(self, step: int) -> Path:
        """The checkpoint of ``step``; raises CheckpointError where it is missing or damaged."""
        folder = self._folder / f"step-{step:06d}"
        if not self._verifies(folder):
            raise CheckpointError(
                f"{folder} is missing or damaged, and the round under way is sampled from it: put it back, or remove "
                "the checkpoints after it to continue from an earlier round"
            )
        return folder

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    @staticmethod
    def _seal(step: int, folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sums = {str(path.relative_to(folder)): _sha256(path) for path in files}
        (folder / _MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=1))
        for path in [*files, folder / _MANIFEST]:
            _sync(path)
        for path in [*{path.parent for path in files}, folder]:
            _sync(path)

    def _point(self, final: Path) -> None:
        pointer = self._folder / "latest.tmp"
        pointer.write_text(final.name)
        _sync(pointer)
        pointer.rename(self._folder / "latest")
        _sync(self._folder)

    @staticmethod
    def _verifies(folder: Path) -> bool:
        manifest = folder / _MANIFEST
        if not manifest.is_file():
            return False
        try:
            sums = json.loads(manifest.read_text())["sha256"]
        except (json.JSONDecodeError, KeyError):
            return False
        return all((folder / name).is_file() and _sha256(folder / name) == value for name, value in sums.items())


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
