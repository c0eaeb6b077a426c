"""Copies of a run's checkpoints at an fsspec location.

LOCATION/RUN/step-000010/…            files
LOCATION/RUN/step-000010/mirror.json  their SHA-256 sums; written last, so that without it there is no copy
LOCATION/RUN/latest                   the name of the newest copy; written after that
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pilaf_ray.errors import ConfigError, MirrorError

logger = logging.getLogger(__name__)

_SUMS = "mirror.json"
_LATEST = "latest"


def file_sum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class MirrorLocation:
    """One run's folder at ``url``; every method blocks, and raises MirrorError where the location fails.

    Args:
        url: e.g. ``s3://bucket/folder``, ``file:///folder`` or ``memory://folder``; keys come from the environment.

    Raises:
        ConfigError: no file system is installed for ``url``.
    """

    def __init__(self, url: str, *, run: str) -> None:
        import fsspec

        try:
            self._files: Any
            self._files, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(f"checkpoint.mirror: {url} cannot be opened ({reason}); install what it needs") from error
        self._root = f"{root.rstrip('/')}/{run}"
        self.name = f"{url.rstrip('/')}/{run}"
        """For messages."""

    def steps(self) -> list[int]:
        """Steps of which there is a whole copy, in order; whether it is sound shows when it is fetched."""
        with self._failures("list"):
            self._files.invalidate_cache()
            if not self._files.exists(self._root):
                return []
            names = [str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
            return sorted(
                int(name.removeprefix("step-"))
                for name in names
                if name.startswith("step-") and self._files.exists(f"{self._root}/{name}/{_SUMS}")
            )

    def upload(self, step: int, files: Mapping[str, Path]) -> None:
        """Copy ``files``, by their names below the step's folder; an older copy of the step goes first."""
        folder = self._folder(step)
        with self._failures(f"write step {step}"):
            if self._files.exists(folder):
                self._files.rm(folder, recursive=True)
            sums = {}
            for name, path in files.items():
                target = f"{folder}/{name}"
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), target)
                sums[name] = file_sum(path)
            self._files.pipe_file(f"{folder}/{_SUMS}", json.dumps({"step": step, "sha256": sums}, indent=1).encode())

    def point(self, step: int) -> None:
        """Name the copy of ``step`` as the newest."""
        with self._failures("write the pointer"):
            self._files.pipe_file(f"{self._root}/{_LATEST}", f"step-{step:06d}".encode())

    def remove(self, step: int) -> None:
        """Forget the copy of ``step``."""
        with self._failures(f"remove step {step}"):
            folder = self._folder(step)
            # First of all it must not be taken for whole.
            self._files.rm_file(f"{folder}/{_SUMS}")
            self._files.rm(folder, recursive=True)

    def fetch(self, step: int, folder: Path, *, below: str = "") -> bool:
        """Copy what lies under ``below`` of the step into ``folder``; False where a file is missing or damaged."""
        with self._failures(f"read step {step}"):
            sums: dict[str, str] = json.loads(self._files.cat_file(f"{self._folder(step)}/{_SUMS}"))["sha256"]
            for name, expected in sums.items():
                if not name.startswith(below):
                    continue
                path = folder / name
                if not path.resolve().is_relative_to(folder.resolve()):
                    return False
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._files.get_file(f"{self._folder(step)}/{name}", str(path))
                except FileNotFoundError:
                    return False
                if file_sum(path) != expected:
                    return False
        return True

    def _folder(self, step: int) -> str:
        return f"{self._root}/step-{step:06d}"

    @contextlib.contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # File systems are plug-ins, and each raises what its client library raises: there is no common base.
            logger.debug("cannot %s at %s", doing, self.name, exc_info=True)
            reason = (str(error).splitlines() or [""])[0]
            raise MirrorError(f"{self.name}: cannot {doing} ({type(error).__name__}: {reason})") from error
