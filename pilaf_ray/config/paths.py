"""Every place of a configuration that may name a file or a folder, found and changed without looking at a disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from pilaf_ray.config.schema import RunConfig

S = TypeVar("S", bound=BaseModel)
Kind = Literal["file", "model", "prompts", "text", "url"]
_FIELDS: dict[str, Kind] = {
    "run.folder": "file",
    "model.policy": "model",
    "model.reference": "model",
    "model.init_from": "file",
    "prompts.train.path": "prompts",
    "prompts.evaluation.path": "prompts",
    "oracle.path": "model",
    "oracle.guidelines": "text",
    "oracle.gold.path": "file",
    "oracle.machine.path": "model",
    "oracle.people.guidelines": "text",
    "oracle.people.gold.path": "file",
    "evaluation.oracle.path": "model",
    "reward_model.path": "model",
    "algorithm.value.path": "model",
    "checkpoint.mirror": "url",
    "store.url": "url",
}
"""What each setting holds. ``learner.offload.nvme_path`` is a disk of each node's own, so it is not here."""
_MODELS = tuple(key for key, kind in _FIELDS.items() if kind == "model")
_LOCAL_SCHEMES = ("file://", "local://", "sqlite:///")
_PROMPT_FILES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedPath:
    """One setting that names, or may name, a place on a file system of the machine that reads it."""

    key: str
    """The setting, e.g. ``model.policy``."""
    path: str
    """Without the scheme of a URL."""
    certain: bool
    """False for what may also be the name of a model or a data set on a hub."""


def named_paths(config: RunConfig) -> tuple[NamedPath, ...]:
    """Every setting that is a path, or may be one; URLs of other machines and built-in data are left out."""
    return tuple(named for named, _, _ in _walk(config.model_dump(mode="json")))


def with_paths(config: RunConfig, change: Callable[[NamedPath], str]) -> RunConfig:
    """``config`` with what ``change`` makes of each of :func:`named_paths`."""
    values = config.model_dump(mode="json")
    for named, section, scheme in _walk(values):
        section[named.key.rpartition(".")[2]] = scheme + change(named)
    return RunConfig.model_validate(values)


def with_models(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    """``config`` with what ``change`` makes of every setting that names a model: a folder, a hub id or a URL."""
    for key in _MODELS:
        config = _changed(config, key.split("."), change)
    return config


def model_names(config: RunConfig) -> tuple[str, ...]:
    """What every setting that names a model says, each once."""
    found: list[str] = []

    def note(name: str) -> str:
        found.append(name)
        return name

    with_models(config, note)
    return tuple(dict.fromkeys(found))


def _changed(section: S, names: Sequence[str], change: Callable[[str], str]) -> S:
    """A copy with another value at ``names``; not validated again, as a policy other than the start may stand there."""
    value = getattr(section, names[0], None)
    if isinstance(value, BaseModel) and len(names) > 1:
        return section.model_copy(update={names[0]: _changed(value, names[1:], change)})
    if isinstance(value, str) and len(names) == 1:
        return section.model_copy(update={names[0]: change(value)})
    return section


def _walk(values: dict[str, Any]) -> Iterator[tuple[NamedPath, dict[str, Any], str]]:
    """Each path with the section that holds it and the scheme before it."""
    for key, kind in _FIELDS.items():
        *parents, name = key.split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        value = section.get(name) if isinstance(section, dict) else None
        if not isinstance(value, str):
            continue
        scheme = next((each for each in _LOCAL_SCHEMES if value.startswith(each)), "")
        path = value.removeprefix(scheme)
        if (certain := _is_path(kind, path, scheme)) is not None:
            yield NamedPath(key=key, path=path, certain=certain), section, scheme


def _is_path(kind: Kind, path: str, scheme: str) -> bool | None:
    """True for a path, None for what is none, False where only a look at the disk can tell."""
    if scheme or kind == "file":
        return True
    match kind:
        case "model":
            if "://" in path:
                return None
            # The form owner/model is a hub's.
            return path.startswith((".", "/", "~")) or path.count("/") > 1
        case "text":
            return True if path.endswith(".md") and "\n" not in path else None
        case "prompts":
            if "://" in path or path.startswith("builtin:"):
                return None
            is_glob = any(sign in path for sign in "*?[")
            return is_glob or path.startswith((".", "/", "~")) or PurePosixPath(path).suffix in _PROMPT_FILES
        case _:
            return None
