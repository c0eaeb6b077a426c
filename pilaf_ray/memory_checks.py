"""What the estimates of memory say of nodes: a refusal where a plan cannot be, a warning where it may not."""

from collections.abc import Iterator
from pathlib import Path

from pilaf_ray.config.algorithms import PpoConfig
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ModelError, PlacementError
from pilaf_ray.memory import MemoryEstimate
from pilaf_ray.model_copies import is_hub_id, with_cached_settings
from pilaf_ray.placement import PlacementPlan
from pilaf_ray.resource_plan import cache_shortage, memory_shortfalls, role_memory, state_shortfalls


def memory_warnings(config: RunConfig, plan: PlacementPlan) -> tuple[str, ...]:
    """Memory that the roles would overfill, a cache that is small, or why neither can be said. No network is used."""
    try:
        config = _with_shapes(config)
        estimates = role_memory(config)
        shortage = cache_shortage(config)
    except ModelError as error:
        return (str(error),)
    return (*memory_shortfalls(config, estimates, plan), *([shortage] if shortage else []))


def check_memory(config: RunConfig, plan: PlacementPlan) -> tuple[str, ...]:
    """What :func:`memory_warnings` says of nodes, once it is sure that what roles must hold has room.

    Raises:
        PlacementError: on some node it has none, whatever the rest takes.
    """
    try:
        config = _with_shapes(config)
        estimates: tuple[MemoryEstimate, ...] = role_memory(config)
    except ModelError as error:
        return (str(error),)
    if refusals := state_shortfalls(config, estimates, plan):
        raise PlacementError("; ".join(refusals))
    return memory_shortfalls(config, estimates, plan)


def _with_shapes(config: RunConfig) -> RunConfig:
    """``config`` with folders of this machine for the models that estimates read; raises ModelError without them."""
    cached = with_cached_settings(config)
    for name in _estimated_models(cached):
        if not (Path(name) / "config.json").is_file():
            where = "in this machine's hub cache" if is_hub_id(name) else "on this machine"
            mend = f": `hf download {name} config.json` fetches it" if is_hub_id(name) else ""
            raise ModelError(f"{name}: there is no config.json of it {where}, so memory cannot be estimated{mend}")
    return cached


def _estimated_models(config: RunConfig) -> Iterator[str]:
    yield config.model.policy
    value = config.algorithm.value if isinstance(config.algorithm, PpoConfig) else None
    for section in (config.scoring_oracle, config.reward_model, value):
        if path := getattr(section, "path", None):
            yield path
