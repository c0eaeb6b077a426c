"""Weights as files in a folder that learner and engines share."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pilaf_ray.engines.weight_tickets import SampleChecksum, WeightUpdate
from pilaf_ray.errors import WeightSyncError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 * 2**30
KEPT_VERSIONS = 2


class FilesystemPublisher:
    """Writes safetensors shards into ``folder/<its own>/v<version>``; keeps the last two that it published.

    A version appears all at once: shards are written and synced under a temporary
    name, and the folder is renamed last.

    Versions go back when a learner is rolled back or rebuilt, and a learner that was given up may come to again. So
    every publisher has a folder of its own, and the order in which it publishes decides what is old, not the number.
    """

    def __init__(self, folder: Path | str) -> None:
        self._shared = Path(folder)
        self._folder = self._shared / f"publisher-{secrets.token_hex(4)}"
        self._published: list[Path] = []
        self._predecessors: list[Path] = []

    def publish(
        self, version: int, named_tensors: Iterable[tuple[str, "Tensor"]], *, adapter_scale: float | None = None
    ) -> WeightUpdate:
        """Write ``version``; an earlier attempt at the same version is replaced.

        Raises:
            WeightSyncError: the folder cannot be written.
        """
        final = self._folder / f"v{version:08d}"
        temporary = self._folder / f"tmp.v{version:08d}"
        checksum = SampleChecksum()
        try:
            if not self._published:
                self._predecessors = list(self._shared.glob("publisher-*"))
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            names = [_write_shard(temporary, i, s) for i, s in enumerate(_shards(named_tensors, checksum))]
            (temporary / "shards.json").write_text(json.dumps(names))
            _sync(temporary / "shards.json")
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(self._folder)
        except OSError as error:
            raise WeightSyncError(
                f"cannot publish weights version {version} in {self._folder}: {error}; "
                "check free space and that the folder is writable"
            ) from error
        self._drop_old(final)
        return checksum.ticket(
            version=version, transport="filesystem", location=str(final), adapter_scale=adapter_scale
        )

    def publish_again(self, version: int) -> WeightUpdate | None:
        """None: the folder is the first way already."""

    def close(self) -> None:
        """Nothing to free: the files stay for generators that join later."""

    def _drop_old(self, newest: Path) -> None:
        self._published = [path for path in self._published if path != newest] + [newest]
        stale, self._published = self._published[:-KEPT_VERSIONS], self._published[-KEPT_VERSIONS:]
        if len(self._published) > 1:
            # By now nobody is told to read what came before this publisher.
            stale += self._predecessors
            self._predecessors = []
        for path in stale:
            shutil.rmtree(path, ignore_errors=True)


def _shards(named_tensors: Iterable[tuple[str, "Tensor"]], checksum: SampleChecksum) -> Iterator[dict[str, "Tensor"]]:
    """Group CPU copies into dictionaries of at most ``SHARD_BYTES`` (or one tensor)."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        # A clone, because tied or gathered tensors may share or reuse their storage.
        copy = tensor.detach().to("cpu", copy=True).contiguous()
        checksum.add(name, copy)
        nbytes = copy.numel() * copy.element_size()
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = copy
        size += nbytes
    if shard:
        yield shard


def _write_shard(folder: Path, index: int, tensors: dict[str, "Tensor"]) -> str:
    from safetensors.torch import save_file

    path = folder / f"shard-{index:05d}.safetensors"
    save_file(tensors, path, metadata={"order": json.dumps(list(tensors))})
    _sync(path)
    return path.name


def _sync(path: Path) -> None:
    """Flush a file or folder entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_folder(location: str) -> list[tuple[str, "Tensor"]]:
    """The tensors of a ticket's ``location`` in the order of publication.

    Raises:
        WeightSyncError: they cannot be read.
    """
    folder = Path(location)
    try:
        shards = json.loads((folder / "shards.json").read_text())
        return [item for shard in shards for item in _read_shard(folder / shard)]
    except OSError as error:
        raise WeightSyncError(
            f"cannot read the weights in {folder}: {error}; the folder must be shared with the learner"
        ) from error


def _read_shard(path: Path) -> Iterator[tuple[str, "Tensor"]]:
    """Tensors in the order of publication (the file itself sorts them)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as shard:
        for name in json.loads(shard.metadata()["order"]):
            yield name, shard.get_tensor(name)
