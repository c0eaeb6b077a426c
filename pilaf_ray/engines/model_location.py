"""A model's folder at a URL that fsspec opens: what is there, and its files, each fetched whole or not at all."""

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from tenacity import Retrying, before_sleep_log, retry_if_exception_type, stop_after_attempt, wait_exponential

from pilaf_ray.errors import ModelError, ModelUnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 5
PAUSE_SECONDS = 1.0
"""Before the second attempt; it doubles from there."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# What file systems say of a file's content, best first, and of when it was written: names differ, and nobody has all.
_CONTENT = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "checksum", "blob_id", "generation", "VersionId")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file of a model as its file system describes it.

    Example: ``StoredFile(name="model.safetensors", size=269_060_552, identity="ETag=…")``
    """

    name: str
    """Below the model's folder."""
    size: int
    """Bytes."""
    identity: str
    """Changes with the content, as far as the file system tells: a sum, an ETag, or else a time."""

    @property
    def is_weights(self) -> bool:
        """Whether a tokenizer and a look at the configuration do without it."""
        return self.name.endswith(_WEIGHTS)


class ModelLocation:
    """The folder at ``url``; methods block, and try again where the file system does not answer.

    Args:
        url: e.g. ``s3://bucket/model``, ``gs://bucket/model`` or ``file:///model``; keys come from the environment.

    Raises:
        ModelError: no file system is installed for ``url``.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._files: Any
            self._files, self._root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ModelError(f"{url} cannot be opened ({_first_line(error)}); install what it needs") from error

    def files(self) -> tuple[StoredFile, ...]:
        """What is there, by name; hidden files and folders are left out.

        Raises:
            ModelError: it is no model: there is nothing, or no config.json.
            ModelUnavailableError: the file system does not answer.
        """
        files = self._again(self._list)
        if not files:
            raise ModelError(f"{self.url}: there is nothing: name the folder of a model")
        if "config.json" not in {file.name for file in files}:
            raise ModelError(
                f"{self.url}: no config.json there (but {files[0].name}): name the folder that holds the model's files"
            )
        return files

    def fetch(self, file: StoredFile, folder: Path) -> None:
        """Copy ``file`` into ``folder``.

        Raises:
            ModelError: it is gone, or not to be read.
            ModelUnavailableError: the file system does not answer, or gives less than it said there is.
            OSError: there is no room.
        """
        self._again(lambda: self._fetch(file, folder / file.name))

    def _list(self) -> tuple[StoredFile, ...]:
        with self._failures("listed"):
            self._files.invalidate_cache()
            described = {_below(self._root, info["name"]): info for info in self._walk(self._root)}
            return tuple(
                StoredFile(name=name, size=int(info["size"]), identity=_identity(info))
                for name, info in sorted(described.items())
                if _is_plain(name)
            )

    def _walk(self, folder: str) -> Iterator[Mapping[str, Any]]:
        """What fsspec's find() gives, but that leaves out, without a word, what cannot be listed just now."""
        for info in self._files.ls(folder, detail=True):
            if info["name"].rstrip("/") == folder.rstrip("/"):
                # Some object stores have an entry for the folder itself.
                continue
            if info["type"] == "directory":
                yield from self._walk(info["name"])
            else:
                yield info

    def _fetch(self, file: StoredFile, path: Path) -> None:
        with self._failures(f"read: {file.name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(f"{self._root.rstrip('/')}/{file.name}", str(path))
        if (came := path.stat().st_size) != file.size:
            raise ModelUnavailableError(
                f"{self.url}: {file.name} is short, {came} of {file.size} bytes came: start again, or upload it again"
            )

    def _again(self, work: Callable[[], T]) -> T:
        retrying = Retrying(
            retry=retry_if_exception_type(ModelUnavailableError),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=PAUSE_SECONDS, max=60.0),
            before_sleep=before_sleep_log(logger, logging.WARNING),
            reraise=True,
        )
        return retrying(work)

    @contextlib.contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        try:
            yield
        except _FINAL as error:
            raise ModelError(
                f"{self.url} cannot be {doing} ({type(error).__name__}: {_first_line(error)}): check the URL, and this "
                "node's credentials"
            ) from error
        except Exception as error:
            # File systems are plug-ins, and each raises what its client library raises: there is no common base.
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            logger.debug("%s cannot be %s", self.url, doing, exc_info=True)
            raise ModelUnavailableError(
                f"{self.url} cannot be {doing} ({type(error).__name__}: {_first_line(error)}), tried {ATTEMPTS} times: "
                "try later, or check this node's network and credentials"
            ) from error


def _below(root: str, path: str) -> str:
    return path.removeprefix(root.rstrip("/")).lstrip("/")


def _is_plain(name: str) -> bool:
    """Whether it is a file of the model, and a name that stays below the folder."""
    return bool(name) and not any(part.startswith(".") for part in PurePosixPath(name).parts)


def _identity(info: Mapping[str, Any]) -> str:
    content = [f"{name}={info[name]}" for name in _CONTENT if info.get(name)]
    if content:
        return " ".join(content)
    times = [f"{name}={info[name]}" for name in _TIMES if info.get(name)]
    # The time of a link is its own: what changes is where it leads.
    return " ".join([*times[:1], *([f"to {info['destination']}"] if info.get("destination") else [])])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
