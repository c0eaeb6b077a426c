"""Where the files of a run are, seen from the machines that a scheduler gives it."""

import os
from pathlib import Path

from pilaf_ray.config.paths import NamedPath, named_paths, with_paths
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ConfigError


def absolute(config: RunConfig, root: Path) -> RunConfig:
    """``config`` with whole paths, relative ones below ``root``; what may be a hub's name stays unless it exists here.

    A job runs in another folder than the one it was submitted from, so relative paths would point nowhere.
    """

    def change(named: NamedPath) -> str:
        whole = _whole(named.path, root)
        return str(whole) if named.certain or whole.exists() else named.path

    return with_paths(config, change)


def require_on_volume(config: RunConfig, mount: str) -> None:
    """Raise ConfigError, in one line, where an absolute path of ``config`` is not below ``mount``."""
    off = [named for named in named_paths(config) if _is_place(named) and not Path(named.path).is_relative_to(mount)]
    if off:
        raise ConfigError(
            f"{_list(off)} {'is' if len(off) == 1 else 'are'} not on the shared volume: a pod sees nothing of this "
            f"machine; put it on the volume and name it below submission.kubernetes.mount_path = {mount}"
        )


def below(config: RunConfig, root: Path, *, mounted: bool) -> RunConfig:
    """``config``, whose paths are absolute, with paths relative to ``root``, which travels to the machine as a folder.

    Args:
        config: what is submitted.
        root: the working folder.
        mounted: whether ``run.folder`` is a mounted bucket, so that it stays what it is.

    Raises:
        ConfigError: a path lies elsewhere, on a disk that the machine does not have.
    """
    stays = ("run.folder",) if mounted else ()
    for named in named_paths(config):
        if named.key in ("checkpoint.mirror", "store.url"):
            raise ConfigError(
                f"{named.key} is a place on the machine's own disk, which goes with it: name an object store "
                "(checkpoint.mirror=s3://…), or a server (store.url=postgresql+psycopg://…)"
            )
    off = [n for n in named_paths(config) if _is_place(n) and n.key not in stays and not _is_below(n.path, root)]
    if off:
        raise ConfigError(
            f"{_list(off)} {'is' if len(off) == 1 else 'are'} not below the working folder {root}, which is all that "
            "travels to the machine: move it there, choose --working-dir, or name a model of the hub or a URL"
        )

    def change(named: NamedPath) -> str:
        if not _is_place(named) or named.key in stays:
            return named.path
        return str(Path(named.path).relative_to(root))

    return with_paths(config, change)


def _whole(path: str, root: Path) -> Path:
    return Path(os.path.normpath(root / Path(path).expanduser()))


def _is_place(named: NamedPath) -> bool:
    """Whether a setting of a configuration that went through :func:`absolute` is a path."""
    return Path(named.path).is_absolute()


def _is_below(path: str, root: Path) -> bool:
    return Path(path).is_relative_to(root)


def _list(named: list[NamedPath]) -> str:
    return ", ".join(f"{each.key} = {each.path}" for each in named)
