"""Models of URLs on this node: fetched by the first process that needs one, read by all.

ROOT/NAME-URL/lock         held by who fetches; the kernel frees it with its process
ROOT/NAME-URL/tmp.…        being written, or left by a process that was killed: the next to fetch removes it
ROOT/NAME-URL/KEY          the model, whole: renamed to this when everything is on disk
ROOT/NAME-URL/KEY.settings the same without weights, for who needs the configuration and the tokenizer only

KEY stands for names, sizes and sums of the files at the URL, so what changes there gets a folder of its own.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from pilaf_ray.engines.checkpoint import sync_path
from pilaf_ray.engines.model_files import require_whole
from pilaf_ray.engines.model_location import ModelLocation, StoredFile
from pilaf_ray.errors import ModelError, ModelUnavailableError

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "PILAF_RAY_MODELS"
FILES_AT_ONCE = 4
_GIB = 2**30
_SOURCE = ".pilaf_source.json"
"""In a copy: where it comes from. Hidden, so that nothing that reads models takes it for a part of one."""
_SETTINGS = ".settings"
# Names of arguments of the roles' classes; an oracle's is ``path``.
_ARGUMENTS = ("policy_path", "reference_path", "model_path", "path")


def is_url(path: str) -> bool:
    """Whether a model's name is a URL, neither a folder nor a hub id."""
    return "://" in path


def store_folder() -> Path:
    """Where this node keeps its copies."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/pilaf_ray/models").expanduser().absolute()


def local_model(path: str, *, weights: bool = True) -> str:
    """The folder of this node that holds the model at the URL ``path``; folders and hub ids stay what they are.

    Blocks while the model is fetched, be it by another process. Where the URL does not answer, a copy from before does.

    Args:
        weights: without them it is enough for a tokenizer and a look at the configuration.

    Raises:
        ModelError: there is no whole model, it cannot be fetched, or there is no room for it.
    """
    if not is_url(path):
        return path
    location = ModelLocation(path)
    shelf = _shelf(path)
    try:
        files = location.files()
    except ModelUnavailableError as error:
        kept = _newest(shelf, weights=weights)
        if kept is None:
            raise
        logger.warning("%s; going on with the copy that is here: %s", error, kept)
        return str(kept)
    return str(_copy(location, files, shelf, weights=weights))


def local_models(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a role's class with this node's folders for URLs of models; raises as :func:`local_model`."""
    # Once for each URL: policy and reference of one name are one model, also if it changes just now.
    folders = {url: local_model(url) for url in dict.fromkeys(_urls(arguments))}
    return _replaced(arguments, folders)


def names_url(arguments: Mapping[str, Any]) -> bool:
    """Whether :func:`local_models` may have something to fetch."""
    return any(True for _ in _urls(arguments))


def source_of(folder: str) -> str:
    """The URL that a copy comes from, for what is written down; any other folder or name is its own."""
    file = Path(folder) / _SOURCE
    return str(json.loads(file.read_text())["url"]) if file.is_file() else folder


def copy_here(url: str, files: Sequence[StoredFile]) -> bool:
    """Whether this node has ``files``, all of what is at ``url``."""
    return (_shelf(url) / _key(files)).is_dir()


def _urls(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _urls(value)
        elif name in _ARGUMENTS and isinstance(value, str) and is_url(value):
            yield value


def _replaced(arguments: Mapping[str, Any], folders: Mapping[str, str]) -> dict[str, Any]:
    changed = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            changed[name] = _replaced(value, folders)
        elif name in _ARGUMENTS and isinstance(value, str):
            changed[name] = folders.get(value, value)
    return changed


def _shelf(url: str) -> Path:
    """The folder of all copies of what is, or was, at ``url``; begins with a name that people know it by."""
    url = url.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rpartition("/")[2]).strip(".-")[:40] or "model"
    return store_folder() / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def _key(files: Sequence[StoredFile]) -> str:
    described = json.dumps([(file.name, file.size, file.identity) for file in files])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _newest(shelf: Path, *, weights: bool) -> Path | None:
    whole = [path for path in shelf.glob("*") if (path / _SOURCE).is_file() and not path.name.startswith("tmp.")]
    if weights:
        whole = [path for path in whole if not path.name.endswith(_SETTINGS)]
    return max(whole, key=lambda path: (path / _SOURCE).stat().st_mtime, default=None)


def _copy(location: ModelLocation, files: Sequence[StoredFile], shelf: Path, *, weights: bool) -> Path:
    """The copy of ``files``, made if need be by one process at a time."""
    key = _key(files)
    places = [shelf / key] if weights else [shelf / key, shelf / (key + _SETTINGS)]

    def found() -> Path | None:
        return next((place for place in places if place.is_dir()), None)

    if (copy := found()) is not None:
        return copy
    with _storing(location.url), _alone(shelf, location.url):
        if (copy := found()) is not None:
            return copy
        # Whoever wrote these is gone, for the lock is ours.
        for leftover in shelf.glob("tmp.*"):
            logger.info("removing %s, which a process that ended left behind", leftover)
            shutil.rmtree(leftover)
        _fill(location, files, places[-1], weights=weights)
    return places[-1]


def _fill(location: ModelLocation, files: Sequence[StoredFile], target: Path, *, weights: bool) -> None:
    wanted = files if weights else [file for file in files if not file.is_weights]
    _require_room(location.url, sum(file.size for file in wanted), target.parent)
    scratch = target.parent / f"tmp.{uuid4().hex[:8]}"
    scratch.mkdir()
    begun = time.monotonic()
    logger.info("fetching %s: %d files to %s", location.url, len(wanted), target)
    try:
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(partial(location.fetch, folder=scratch), wanted))
        if weights:
            require_whole(scratch, name=location.url)
        if _key(location.files()) != _key(files):
            raise ModelError(f"{location.url} changed while it was fetched: start again once its upload is done")
        (scratch / _SOURCE).write_text(json.dumps({"url": location.url}))
        _sync_all(scratch)
        scratch.rename(target)
        sync_path(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("fetched %s in %.1f s", location.url, time.monotonic() - begun)


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def _require_room(url: str, needed: int, shelf: Path) -> None:
    free = shutil.disk_usage(shelf).free
    if needed > free:
        raise ModelError(
            f"{url}: {needed / _GIB:.1f} GiB, and {store_folder()} has {free / _GIB:.1f} GiB left: remove copies there "
            f"that are not needed any more, or set {FOLDER_VARIABLE} to a folder with room"
        )


@contextlib.contextmanager
def _alone(shelf: Path, url: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    shelf.mkdir(parents=True, exist_ok=True)
    lock = FileLock(shelf / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process of this node that fetches %s", url)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _storing(url: str) -> Iterator[None]:
    """What goes wrong on this node's disk, in one line."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{url}: no copy can be kept in {store_folder()} ({error.strerror or error}): set {FOLDER_VARIABLE} to a "
            "folder of this node with room that it may write"
        ) from error
