"""A configuration's models of URLs and hub ids, seen from the machine that this runs on."""

from collections.abc import Iterator
from pathlib import Path

from pilaf_ray.config.paths import model_names, with_models
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.model_location import ModelLocation
from pilaf_ray.engines.model_store import copy_here, is_url, local_model
from pilaf_ray.errors import ModelError

_GIB = 2**30


def with_local_settings(config: RunConfig) -> RunConfig:
    """``config`` to look at models with: URLs become folders of this machine with configuration and tokenizer.

    Roles are told the URLs, and look on their own nodes; what is written down has them, too.

    Raises:
        ModelError: a URL cannot be read, or holds no model.
    """
    return with_models(config, lambda name: local_model(name, weights=False))


def with_cached_settings(config: RunConfig) -> RunConfig:
    """``config`` with the folder of this machine's hub cache for each hub id whose config.json is there.

    Nothing is asked of a network; other names stay what they are.
    """
    return with_models(config, _cached)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a hub's, OWNER/MODEL, and no folder is called so."""
    looks_local = is_url(name) or name.startswith((".", "/", "~")) or name.count("/") != 1
    return not looks_local and not Path(name).is_dir()


def _cached(name: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json") if is_hub_id(name) else None
    except ValueError:
        # Letters that no name of the hub has.
        return name
    return str(Path(found).parent) if isinstance(found, str) else name


def describe_models(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Each URL, what is there, and what is wrong with it ("" if nothing), without fetching anything."""
    for name in filter(is_url, model_names(config)):
        try:
            files = ModelLocation(name).files()
        except ModelError as error:
            yield name, "no model", str(error)
            continue
        size = sum(file.size for file in files) / _GIB
        here = "a copy is here" if copy_here(name, files) else "not fetched to this machine yet"
        yield name, f"{len(files)} files, {size:.1f} GiB, {here}", ""
