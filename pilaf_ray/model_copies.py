"""A configuration's models of URLs, seen from the machine that this runs on."""

from collections.abc import Iterator

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
