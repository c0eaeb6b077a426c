"""How much memory a configuration takes on its cluster, with every weight trained and with adapters.

Models may be folders that hold a ``config.json`` and nothing else: shapes are all that is read.
"""

from collections.abc import Iterator

from pilaf_ray.config.model import LoraSection
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.lora_checks import count_adapter_parameters
from pilaf_ray.errors import ConfigError
from pilaf_ray.memory import BYTES, GIB, MemoryEstimate, read_shape
from pilaf_ray.model_copies import with_local_settings
from pilaf_ray.resource_plan import lora_settings, memory_shortfalls, plan_on, planned_nodes, role_memory, role_requests
from pilaf_ray.role_formats import role_formats

_FULL, _LORA = "every weight", "adapters"


def sizing(config: RunConfig, *, rank: int) -> str:
    """A Markdown table of the roles, and lines about updates, placement and what does not fit.

    Args:
        rank: of the adapters, on all linear layers, where ``model.lora`` does not say more.

    Raises:
        ConfigError: ``resources.nodes`` does not describe a cluster.
        PlacementError: the roles do not fit it.
        ModelError: a model has no configuration.
    """
    config = with_local_settings(config)
    nodes = planned_nodes(config)
    if not nodes:
        raise ConfigError("resources.nodes: describe the cluster to size for, e.g. [{count: 1, gpus: 8, cpus: 96}]")
    variants = {_FULL: _with_lora(config, None), _LORA: _with_lora(config, config.model.lora or _default(rank))}
    estimates = {name: {e.role: e for e in role_memory(variant)} for name, variant in variants.items()}
    plan = plan_on(config, nodes)
    plan.require()
    lines = [*_table(config, estimates[_FULL], estimates[_LORA]), "", _updates(config, variants[_LORA]), ""]
    lines += [f"- {node}: {_counted(members)}" for node, members in sorted(plan.members_by_node().items())]
    for name, variant in variants.items():
        found = memory_shortfalls(variant, tuple(estimates[name].values()), plan)
        lines += ["", *(f"with {name}: {line}" for line in found)] if found else []
    return "\n".join(lines) + "\n"


def _default(rank: int) -> LoraSection:
    return LoraSection(rank=rank, alpha=2.0 * rank)


def _with_lora(config: RunConfig, lora: LoraSection | None) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})


def _table(config: RunConfig, full: dict[str, MemoryEstimate], lora: dict[str, MemoryEstimate]) -> Iterator[str]:
    gpus = sum(node.count * node.gpus for node in config.resources.nodes)
    sizes = {f"{node.gpu_memory_gib:g}" for node in config.resources.nodes if node.gpu_memory_gib}
    of = f" of {' or '.join(sorted(sizes))} GiB" if sizes else ""
    billions = read_shape(config.model.policy).parameters / 1e9
    what = f"{billions:.1f}B policy, {gpus:g} GPUs{of}"
    yield f"| {what} | replicas × GPUs | GiB a GPU | with adapters | GiB of host | with adapters |"
    yield "|---|---|---|---|---|---|"
    workers = {"generator": config.generation.tensor_parallel_size}
    for request in role_requests(config):
        role, each = request.role, max(request.gpus, workers.get(request.role, 1) if request.gpus else 0)
        device = [f"{e[role].device_bytes / GIB:.1f}" if e[role].device else "–" for e in (full, lora)]
        host = [f"{e[role].host_bytes / GIB:.1f}" for e in (full, lora)]
        yield f"| {role} | {request.replicas} × {each:g} | {' | '.join(device)} | {' | '.join(host)} |"


def _updates(config: RunConfig, adapted: RunConfig) -> str:
    """What an update of the generators moves."""
    settings = lora_settings(adapted)
    assert settings is not None, "the second variant has adapters"
    element = BYTES[role_formats(config).learner]
    whole = element * read_shape(config.model.policy).parameters
    few = element * count_adapter_parameters(config.model.policy, settings)
    return (
        f"An update moves {whole / GIB:.1f} GiB to each generator, with adapters of rank {settings.rank} "
        f"{few / GIB:.2f} GiB: 1/{whole / few:.0f}."
    )


def _counted(members: tuple[str, ...] | list[str]) -> str:
    """Replicas by role, e.g. ``4 learner, 2 generator``."""
    roles = [member.rsplit("-", 1)[0] for member in members]
    return ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
