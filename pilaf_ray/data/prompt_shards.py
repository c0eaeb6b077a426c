"""Prompt sets in pieces that are read one at a time: row groups of Parquet files, stretches of JSONL files.

Only the list of pieces is held: for Parquet it comes from the files' footers, for JSONL from one pass over them.
Paths are files, folders, globs, or URLs of any file system that fsspec knows.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from pilaf_ray.errors import PromptError

LINES = 4096
"""Prompts of a JSONL shard."""
_SUFFIXES = (".parquet", ".jsonl")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A piece of a file.

    Example: ``Shard(file="/data/a.parquet", place=3, end=0, first=30_000, rows=10_000)``
    """

    file: str
    place: int
    """Row group, or the byte at which the stretch begins."""
    end: int
    """The byte behind the stretch; 0 for row groups."""
    first: int
    """Number of its first prompt in the whole set, from 0."""
    rows: int


def is_sharded(path: str) -> bool:
    """Whether ``path`` is a URL or a glob, so that a list of files must be made of it."""
    return "://" in path or any(sign in path for sign in "*?[")


class PromptShards:
    """The pieces of a prompt set, in the order of the files' names.

    Args:
        path: a file, folder, glob or URL; the files end in ``.parquet`` or ``.jsonl``.
        column: holds the prompt text.
        limit: leave out what comes after so many prompts.

    Raises:
        PromptError: in one line, where there are no such files, or one of them cannot be read.
    """

    def __init__(self, path: str, *, column: str, limit: int | None = None) -> None:
        self._path, self._column = path, column
        self._files, names = _find(path)
        shards: list[Shard] = []
        rows = 0
        for name in names:
            for place, end, count in self._guarded(name, self._pieces, name):
                count = count if limit is None else min(count, limit - rows)
                if count > 0:
                    shards.append(Shard(file=name, place=place, end=end, first=rows, rows=count))
                    rows += count
            if limit is not None and rows >= limit:
                break
        if not rows:
            raise PromptError(f"{path}: no prompts in column '{column}'")
        self.shards = tuple(shards)
        self.rows = rows

    @property
    def fingerprint(self) -> str:
        """Changes when files are added, removed or get another number of prompts; their texts are not read."""
        described = [(s.file.rpartition("/")[2], s.place, s.end, s.rows) for s in self.shards]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def read(self, shard: Shard) -> list[str]:
        """The texts of one shard; tries again where the file system does not answer. Raises PromptError."""
        values = self._guarded(shard.file, _read_again, self._values, shard)
        return checked_texts(shard.file, self._column, values, before=shard.first)

    def texts(self) -> Iterator[str]:
        """All texts, a shard at a time."""
        for shard in self.shards:
            yield from self.read(shard)

    def _guarded(self, name: str, work: Any, *arguments: Any) -> Any:
        import pyarrow

        try:
            return work(*arguments)
        except pyarrow.ArrowInvalid as error:
            raise PromptError(f"{name}: not a Parquet file: {str(error).splitlines()[0]}") from error
        except OSError as error:
            raise PromptError(f"{name}: cannot be read: {str(error).splitlines()[0]}") from error

    def _pieces(self, name: str) -> list[tuple[int, int, int]]:
        """(place, end, prompts) of each piece of a file."""
        import pyarrow.parquet as parquet

        with self._files.open(name, "rb") as stream:
            if name.endswith(".jsonl"):
                return _stretches(stream)
            metadata = parquet.ParquetFile(stream).metadata
            names = metadata.schema.to_arrow_schema().names
            if self._column not in names:
                raise PromptError(f"{name}: no column '{self._column}'; it has {', '.join(names)}")
            return [(group, 0, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]

    def _values(self, shard: Shard) -> list[object]:
        import pyarrow.parquet as parquet

        with self._files.open(shard.file, "rb") as stream:
            if shard.end:
                stream.seek(shard.place)
                return _parse(stream.read(shard.end - shard.place), shard, self._column)
            table = parquet.ParquetFile(stream).read_row_group(shard.place, columns=[self._column])
        values: list[object] = table[self._column].slice(0, shard.rows).to_pylist()
        return values


def _find(path: str) -> tuple[Any, list[str]]:
    """The file system of ``path``, and the names of the files there, sorted."""
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(path)
        if any(sign in root for sign in "*?["):
            names = files.glob(root)
        else:
            names = files.find(root) if files.isdir(root) else [root]
    except (OSError, ValueError, ImportError) as error:
        # ImportError: fsspec says which package speaks the protocol.
        raise PromptError(f"{path}: cannot be listed: {str(error).splitlines()[0]}") from error
    chosen = sorted(name for name in names if name.endswith(_SUFFIXES))
    if not chosen:
        raise PromptError(f"{path}: no {' or '.join(_SUFFIXES)} file there{_hint(path, names)}")
    return files, chosen


def _hint(path: str, names: Iterable[str]) -> str:
    """What may have been meant by a path where no prompts are."""
    if any(name.endswith(".arrow") for name in names):
        return "; write data sets with to_parquet instead of save_to_disk"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists():
        return f"; if it is a data set of the hub, name its files: hf://datasets/{path}/**/*.parquet"
    return ""


def _stretches(stream: BinaryIO) -> list[tuple[int, int, int]]:
    """(begin, end, prompts) of stretches of whole lines; blank lines are no prompts."""
    found: list[tuple[int, int, int]] = []
    begin = place = count = 0
    for line in stream:
        place += len(line)
        count += bool(line.strip())
        if count == LINES:
            found.append((begin, place, count))
            begin, count = place, 0
    if count:
        found.append((begin, place, count))
    return found


def _parse(data: bytes, shard: Shard, column: str) -> list[object]:
    values: list[object] = []
    for line in data.split(b"\n"):
        if not line.strip() or len(values) == shard.rows:
            continue
        try:
            values.append(json.loads(line)[column])
        except (ValueError, KeyError, TypeError) as error:
            number = shard.first + len(values) + 1
            raise PromptError(f"{shard.file}: prompt {number} is not a JSON object with the key '{column}'") from error
    return values


def _passes(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, _FINAL)


@retry(retry=retry_if_exception(_passes), stop=stop_after_attempt(4), wait=wait_exponential(max=8), reraise=True)
def _read_again(read: Any, shard: Shard) -> Any:
    return read(shard)


def checked_texts(path: str, column: str, values: Iterable[object], *, before: int = 0) -> list[str]:
    """Refuse what str() would turn into a prompt that nobody wrote, such as 'None'."""
    texts = []
    for number, value in enumerate(values, start=before + 1):
        if not isinstance(value, str) or not value.strip():
            raise PromptError(f"{path}: prompt {number} in column '{column}' is {value!r}: give a non-empty text")
        texts.append(value)
    return texts
