"""Atomic checkpoints: temporary folder, sync, manifest, rename, then the pointer."""

import asyncio
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from pilaf_ray.engines.retention import RetentionPolicy
from pilaf_ray.errors import CheckpointError

_MANIFEST = "manifest.json"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, if there is one."""
    return checkpoints / f"step-{step:06d}"


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files that a checkpoint is made of, its manifest among them."""
    return [*read_manifest(folder)["sha256"], _MANIFEST]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, learners and sums."""
    manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    return manifest


class CheckpointStore:
    """Checkpoints ``step-000010`` in one folder; :class:`RetentionPolicy` says which stay.

    Args:
        scores: what is known of steps when one is written, higher is better.
        held: steps that somebody still reads; they are removed with a later checkpoint.
        facts: what the manifest says beside the step and the sums.
        clean: remove what a killed run has left half-written; not for those who only look.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_best: int = 0,
        keep_every: int | None = None,
        scores: Callable[[], Mapping[int, float]] = dict,
        held: Callable[[], Set[int]] = frozenset,
        facts: Mapping[str, Any] | None = None,
        clean: bool = True,
    ) -> None:
        self._folder = folder
        for leftover in folder.glob("tmp.*") if clean else ():
            shutil.rmtree(leftover)
        self._retention = RetentionPolicy(last=keep_last, best=keep_best, every=keep_every)
        self._scores, self._held = scores, held
        self._facts = dict(facts or {})
        self._behind: asyncio.Task[None] | None = None

    async def write(self, step: int, writer: Callable[[Path], Awaitable[None]], *, keep: int | None = None) -> Path:
        """Let ``writer`` fill a folder, then publish it; a failure leaves the others intact.

        The checkpoint of step ``keep`` is not removed, however old it is.
        """
        found: list[Path] = []

        async def published(_step: int, path: Path) -> None:
            found.append(path)

        await self.write_behind(step, writer, published=published, keep=keep)
        await self.finish()
        return found[0]

    async def write_behind(
        self,
        step: int,
        writer: Callable[[Path], Awaitable[None]],
        *,
        published: Callable[[int, Path], Awaitable[None]],
        keep: int | None = None,
    ) -> None:
        """Return once ``writer`` has filled a folder; it is hashed, synced and published in the background.

        One at a time: an earlier checkpoint is finished first. Its failure is raised here, or by :meth:`finish`.
        """
        await self.finish()
        # Never a name that was used before: a learner that was given up, but lives on behind a cut network, may still
        # write into the folder that it was told.
        temporary = self._folder / f"tmp.{step}.{uuid4().hex[:8]}"
        with self._failures(step):
            try:
                temporary.mkdir(parents=True)
                await writer(temporary)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        self._behind = asyncio.create_task(self._publish_behind(step, temporary, published, keep))

    async def finish(self) -> None:
        """Return once the checkpoint under way, if any, is published; raises CheckpointError."""
        behind, self._behind = self._behind, None
        if behind is not None:
            # Whoever waits may be cancelled; the checkpoint is not.
            await asyncio.shield(behind)

    async def _publish_behind(
        self, step: int, temporary: Path, published: Callable[[int, Path], Awaitable[None]], keep: int | None
    ) -> None:
        final = step_folder(self._folder, step)
        with self._failures(step):
            await asyncio.to_thread(self._publish, step, temporary, final, keep)
        await published(step, final)

    @contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise CheckpointError(
                f"checkpoint of step {step} in {self._folder}: {why}; earlier checkpoints are intact, "
                "make room and continue with --resume"
            ) from error

    def _publish(self, step: int, temporary: Path, final: Path, keep: int | None) -> None:
        try:
            self._seal(step, temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._point(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune(step, keep)

    def _prune(self, newest: int, keep: int | None) -> None:
        folders = {_step(folder): folder for folder in self._all()}
        kept = self._retention.kept(folders, newest=newest, scores=self._scores(), serving=keep)
        for step in folders.keys() - kept - self._held():
            shutil.rmtree(folders[step])

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, damaged ones included; the newest comes last."""
        return [_step(folder) for folder in self._all()]

    def latest(self, *, before: int | None = None) -> tuple[int, Path] | None:
        """(step, folder) of the newest checkpoint that verifies, of those of steps before ``before``."""
        for folder in reversed(self._all()):
            if (before is None or _step(folder) < before) and self._verifies(folder):
                return _step(folder), folder
        return None

    def at(self, step: int) -> Path:
        """The checkpoint of ``step``; raises CheckpointError where it is missing or damaged."""
        folder = step_folder(self._folder, step)
        if not self._verifies(folder):
            raise CheckpointError(
                f"{folder} is missing or damaged, and the round under way is sampled from it: put it back, or remove "
                "the checkpoints after it to continue from an earlier round"
            )
        return folder

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    def _seal(self, step: int, folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sums = {str(path.relative_to(folder)): _sha256(path) for path in files}
        (folder / _MANIFEST).write_text(json.dumps({"step": step, **self._facts, "sha256": sums}, indent=1))
        for path in [*files, folder / _MANIFEST]:
            sync_path(path)
        for path in [*{path.parent for path in files}, folder]:
            sync_path(path)

    def _point(self, final: Path) -> None:
        pointer = self._folder / "latest.tmp"
        pointer.write_text(final.name)
        sync_path(pointer)
        pointer.rename(self._folder / "latest")
        sync_path(self._folder)

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


def sync_path(path: Path) -> None:
    """Return once a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
