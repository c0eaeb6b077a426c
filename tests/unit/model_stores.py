"""Models to fetch, file systems that count and misbehave, and what other processes do with them."""

import json
import logging
import os
import struct
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from pilaf_ray.engines.model_store import local_model

CONTROL = "PILAF_TEST_CONTROL"
"""The folder by which a test follows :class:`CountedFileSystem` in other processes."""
WEIGHTS = "model.safetensors"


def safetensors(values: bytes) -> bytes:
    """A file of one tensor of bytes."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


MODEL = {
    "config.json": b'{"model_type": "none"}',
    "tokenizer.json": b"{}",
    WEIGHTS: safetensors(bytes(range(256))),
    "more/notes.txt": b"in a folder below",
    ".cache/huggingface/x.metadata": b"left by a download",
}
FETCHED = {name: data for name, data in MODEL.items() if not name.startswith(".")}


def write_model(folder: Path, **changed: bytes) -> Path:
    """The model as files, some of them changed."""
    for name, data in {**MODEL, **changed}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What the files of a copy hold, without the one that says where it comes from."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != ".pilaf_source.json"}


class CountedFileSystem(LocalFileSystem):
    """Files of this machine; what is fetched is written down, and the weights may be held back in the middle."""

    protocol = "counted"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("counted://"))

    def get_file(self, path1: str, path2: str, *arguments: Any, **settings: Any) -> None:
        control = Path(os.environ[CONTROL])
        with (control / "fetched").open("a") as log:
            log.write(f"{os.getpid()} {Path(path1).name}\n")
        if (control / "hold").exists() and path1.endswith(WEIGHTS):
            data = Path(path1).read_bytes()
            Path(path2).write_bytes(data[: len(data) // 2])
            (control / "halfway").write_text("")  # a pipe: here the test is told
            (control / "never").read_text()  # a pipe that nobody writes to
        super().get_file(path1, path2, *arguments, **settings)


class MoodyFileSystem(MemoryFileSystem):
    """Memory of this process that counts, refuses, and gives less than it says."""

    protocol = "moody"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refusals: ClassVar[list[Exception]] = []
    fetched: ClassVar[list[str]] = []
    short: ClassVar[set[str]] = set()

    def ls(self, path: str, detail: bool = True, **settings: Any) -> Any:
        self._refuse()
        return super().ls(path, detail=detail, **settings)

    def get_file(self, rpath: str, lpath: Any, *arguments: Any, **settings: Any) -> None:
        self._refuse()
        self.fetched.append(Path(rpath).name)
        super().get_file(rpath, lpath, *arguments, **settings)
        if Path(rpath).name in self.short:
            Path(lpath).write_bytes(Path(lpath).read_bytes()[:10])

    def _refuse(self) -> None:
        if self.refusals:
            raise self.refusals.pop()

    @classmethod
    def forget(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.refusals.clear()
        cls.fetched.clear()
        cls.short.clear()


fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
fsspec.register_implementation("moody", MoodyFileSystem, clobber=True)


def fetch_together(url: str, barrier: Any, found: Any) -> None:
    """A process that wants the model at the same moment as others."""
    barrier.wait()
    found.put(local_model(url))


class _TellsOfWaiting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("waiting for another process"):
            (Path(os.environ[CONTROL]) / "waiting").write_text("")  # a pipe


def fetch_alone(url: str) -> None:
    """A process that wants the model, and says when it waits for another one."""
    logging.basicConfig(level=logging.INFO, handlers=[_TellsOfWaiting()])
    local_model(url)
