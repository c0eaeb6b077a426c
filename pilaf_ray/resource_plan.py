"""What a configuration asks of a cluster: reservations, memory and the nodes it describes."""

import os
from collections.abc import Mapping
from dataclasses import replace

from pilaf_ray.config.algorithms import PpoConfig, ValueModelConfig
from pilaf_ray.config.oracle import FunctionOracleConfig
from pilaf_ray.config.resources import LearnerResourcesConfig, RoleResourcesConfig
from pilaf_ray.config.reward_model import RewardModelSection
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.lora_checks import LoraSettings, count_adapter_parameters
from pilaf_ray.engines.zero_options import OffloadSettings
from pilaf_ray.memory import (
    BYTES,
    GIB,
    GeneratorSettings,
    LearnerSettings,
    MemoryEstimate,
    ModelShape,
    function_memory,
    generator_memory,
    learner_memory,
    read_shape,
    scalar_head_memory,
    scorer_memory,
)
from pilaf_ray.placement import Bundle, NodeCapacity, PlacementPlan, RoleRequest, make_groups, plan_placement
from pilaf_ray.role_formats import oracle_format, role_formats

TAKE_TURNS = ("generator", "learner")
"""Who rests where ``resources.turns`` is set."""
STATES = ("weights", "weights for the backward", "master weights", "optimizer", "gradients", "reduced gradients")
"""Parts of an estimate that a role keeps between two uses of its device."""


def role_requests(config: RunConfig) -> tuple[RoleRequest, ...]:
    """What every role asks of the cluster."""
    r, generation = config.resources, config.generation

    def request(role: str, replicas: int, count_setting: str, asked: RoleResourcesConfig) -> RoleRequest:
        return RoleRequest(
            role=role,
            replicas=replicas,
            cpus=asked.cpus,
            gpus=asked.gpus,
            memory_gib=asked.memory_gib,
            labels=tuple(sorted(asked.node_labels.items())),
            colocate=asked.colocate,
            gang=isinstance(asked, LearnerResourcesConfig),
            strategy=getattr(asked, "strategy", r.learner.strategy),
            setting=f"resources.{role}",
            count_setting=count_setting,
        )

    reward = config.reward_model
    return (
        *((request("reward", reward.ranks, "reward_model.ranks", r.reward),) if reward else ()),
        request("generator", generation.replicas, "generation.replicas", r.generator),
        request("learner", config.learner.ranks, "learner.ranks", r.learner),
        request("reference", config.reference.replicas, "reference.replicas", r.reference),
        request("oracle", config.scoring_oracle.replicas, "oracle.replicas", r.oracle),
    )


def planned_nodes(config: RunConfig) -> tuple[NodeCapacity, ...]:
    """The nodes that ``resources.nodes`` describes."""
    return tuple(
        NodeCapacity(
            name=f"node-{kind}.{number}" if len(config.resources.nodes) > 1 else f"node-{number}",
            cpus=node.cpus,
            gpus=node.gpus,
            memory_gib=node.memory_gib,
            labels=tuple(sorted(node.labels.items())),
            gpu_memory_gib=node.gpu_memory_gib,
        )
        for kind, node in enumerate(config.resources.nodes)
        for number in range(node.count)
    )


def cluster_address(config: RunConfig) -> str | None:
    """The cluster that the run joins; None where it starts a private one on this machine."""
    return config.resources.address or os.environ.get("RAY_ADDRESS")


def lora_settings(config: RunConfig) -> LoraSettings | None:
    """The adapters that are trained; None where every weight is."""
    return None if config.model.lora is None else LoraSettings(**config.model.lora.model_dump())


def shares_base(config: RunConfig) -> bool:
    """Whether one network of the generator's computes policy and reference."""
    generation = config.generation
    possible = generation.tensor_parallel_size == 1 and generation.enforce_eager
    # An evaluation names a checkpoint's whole weights as the policy.
    starts_there = config.model.policy == config.model.reference_path
    return config.model.lora is not None and generation.share_base and possible and starts_there


def offload_settings(config: RunConfig) -> OffloadSettings:
    """What leaves the learner's device between uses."""
    return OffloadSettings(**config.learner.offload.model_dump())


def role_memory(config: RunConfig, shape: ModelShape | None = None) -> tuple[MemoryEstimate, ...]:
    """One replica of every role; ``shape`` is the policy's, read from its folder when left out."""
    policy = shape or read_shape(config.model.policy)
    formats = role_formats(config)
    generation, learner, r = config.generation, config.learner, config.resources
    lora = lora_settings(config)
    adapters = None if lora is None else count_adapter_parameters(config.model.policy, lora)
    estimates = (
        generator_memory(
            policy,
            GeneratorSettings(
                dtype=formats.generator,
                kv_cache_gib=generation.kv_cache_gib,
                max_num_seqs=generation.max_num_seqs,
                max_num_batched_tokens=max(generation.max_num_batched_tokens, config.model.max_length),
                tensor_parallel_size=generation.tensor_parallel_size,
                on_gpu=r.generator.gpus > 0,
                adapter_parameters=adapters,
                shares_base=shares_base(config),
            ),
        ),
        _learner_memory(config, policy, adapters),
        scorer_memory(
            "reference",
            policy,
            dtype=formats.reference,
            tokens=max(config.reference.micro_batch_tokens, config.model.max_length),
            chunk=learner.logprob_chunk_tokens,
            on_gpu=r.reference.gpus > 0,
        ),
        _oracle_memory(config),
        *((_reward_memory(config, policy),) if config.reward_model else ()),
    )
    if not r.turns:
        return estimates
    return tuple(_with_room_to_rest(each) if each.role in TAKE_TURNS else each for each in estimates)


def _with_room_to_rest(estimate: MemoryEstimate) -> MemoryEstimate:
    """What is on the device between two uses is on the host while another role has the device."""
    states = _states(estimate.device)
    return replace(estimate, host=(*estimate.host, ("at rest", states)) if states else estimate.host)


def _states(parts: tuple[tuple[str, float], ...]) -> float:
    return sum(size for name, size in parts if name.removeprefix("value model's ") in STATES)


def _scalar_head_shape(
    head: RewardModelSection | ValueModelConfig, policy: ModelShape
) -> tuple[ModelShape, ModelShape, float]:
    """The model that a scalar head is put on, what is left of it, and which share of its layers is trained."""
    shape = whole = read_shape(head.path, head=False) if head.path else policy
    if head.layers is not None and head.layers < shape.layers:
        each = (shape.parameters - shape.vocabulary * shape.hidden) / shape.layers
        left = shape.parameters - round(each * (shape.layers - head.layers))
        shape = replace(shape, layers=head.layers, parameters=left)
    return whole, shape, 1.0 if head.trainable_layers is None else head.trainable_layers / shape.layers


def _learner_memory(config: RunConfig, policy: ModelShape, adapters: int | None) -> MemoryEstimate:
    """The policy's learner, and in the same process PPO's value model."""
    learner = config.learner
    settings = LearnerSettings(
        precision=role_formats(config).learner,
        zero_stage=learner.zero_stage,
        ranks=learner.ranks,
        micro_batch_tokens=max(learner.micro_batch_tokens, config.model.max_length),
        logprob_chunk_tokens=learner.logprob_chunk_tokens,
        gradient_checkpointing=learner.gradient_checkpointing,
        transport=config.weights.transport,
        on_gpu=config.resources.learner.gpus > 0,
        adapter_parameters=adapters,
        quantised=config.model.lora is not None and config.model.lora.quantise is not None,
        sequence_parallel=learner.sequence_parallel,
        hybrid_ranks=learner.hybrid_ranks,
        offload=offload_settings(config),
    )
    own = learner_memory(policy, settings)
    if not isinstance(config.algorithm, PpoConfig):
        return own
    value = config.algorithm.value
    _, shape, trained = _scalar_head_shape(value, policy)
    every_weight = replace(settings, logprob_chunk_tokens=0, adapter_parameters=None, quantised=False)
    # It is loaded before either of the two has trained, when there is room.
    beside = scalar_head_memory("value", shape, every_weight, trained=trained, loaded=replace(shape, stored=0))
    # The two take turns, so activations are there once; the process is one.
    shared = {"activations", "allocator", "runtime", "logits"}
    device, host = (
        (*mine, *((f"value model's {name}", size) for name, size in more if name not in shared))
        for mine, more in ((own.device, beside.device), (own.host, beside.host))
    )
    first_only = (*own.first_only, *(f"value model's {name}" for name in beside.first_only))
    return replace(own, device=device, host=host, first_only=first_only)


def _reward_memory(config: RunConfig, policy: ModelShape) -> MemoryEstimate:
    reward = config.reward_model
    precision = role_formats(config).reward
    assert reward is not None and precision is not None, "only a run with a reward model has memory for it"
    whole, shape, trained = _scalar_head_shape(reward, policy)
    return scalar_head_memory(
        "reward",
        shape,
        LearnerSettings(
            precision=precision,
            zero_stage=reward.zero_stage,
            ranks=reward.ranks,
            micro_batch_tokens=max(reward.micro_batch_tokens, config.model.max_length),
            logprob_chunk_tokens=0,
            gradient_checkpointing=reward.gradient_checkpointing,
            transport="none",
            on_gpu=config.resources.reward.gpus > 0,
        ),
        trained=trained,
        loaded=whole,
    )


def _oracle_memory(config: RunConfig) -> MemoryEstimate:
    oracle = config.scoring_oracle
    if isinstance(oracle, FunctionOracleConfig):
        return function_memory()
    return scorer_memory(
        "oracle",
        read_shape(oracle.path, head=False),
        dtype=oracle_format(oracle, gpus=config.resources.oracle.gpus),
        tokens=oracle.micro_batch_size * oracle.max_length,
        chunk=0,
        on_gpu=config.resources.oracle.gpus > 0,
    )


def cache_shortage(config: RunConfig) -> str | None:
    """One line where a generator's cache holds less than a quarter of ``max_num_seqs`` sequences of full length.

    Most sequences are shorter than ``model.max_length`` or not yet at their end, so less than all is enough; below a
    quarter requests wait for each other, or lose their cache and are computed again.
    """
    generation, longest = config.generation, config.model.max_length
    shape = read_shape(config.model.policy)
    workers = generation.tensor_parallel_size
    # Each worker keeps its share of the heads, at least one, and caches of policy and reference.
    heads = -(-shape.kv_heads // workers)
    element = BYTES[role_formats(config).generator]
    a_sequence = 2 * longest * replace(shape, kv_heads=heads).kv_bytes_a_token(element) / GIB
    whole, wanted = int(generation.kv_cache_gib / a_sequence), generation.max_num_seqs
    if 4 * whole >= wanted:
        return None
    return (
        f"generation.kv_cache_gib = {generation.kv_cache_gib:g} holds {whole} sequences of model.max_length = "
        f"{longest} tokens, and generation.max_num_seqs = {wanted} may be under way: raise it to "
        f"{a_sequence * wanted / 4:.1f} or more, or lower generation.max_num_seqs"
    )


def memory_shortfalls(config: RunConfig, estimates: tuple[MemoryEstimate, ...], plan: PlacementPlan) -> tuple[str, ...]:
    """Devices and nodes of ``plan`` that the roles placed on them would fill beyond their memory."""
    by_role = {estimate.role: estimate for estimate in estimates}
    on_device = {role: estimate.device_bytes for role, estimate in by_role.items()}
    nodes = {node.name: node for node in plan.nodes}
    lines = []
    for name, bundle in plan.placed_bundles():
        needed, size = _device_bytes(config, bundle, on_device) / GIB, nodes[name].gpu_memory_gib
        if size and needed > size:
            over = f"{_users(bundle)} would take {needed:.0f} GiB of a GPU that has {size:.4g}"
            lines.append(f"{over}: {_mend(config, bundle)}")
    for name, members in plan.members_by_node().items():
        replicas = [member.rsplit("-", 1) for member in members]
        needed = sum(by_role[role].host_bytes_of(int(replica)) for role, replica in replicas) / GIB
        if nodes[name].memory_gib and needed > nodes[name].memory_gib:
            lines.append(
                f"{name} has {nodes[name].memory_gib:.0f} GiB of memory, the roles on it would take {needed:.0f}: "
                f"{', '.join(members)}; spread them over more nodes, or take larger ones"
            )
    return tuple(dict.fromkeys(lines))


def state_shortfalls(config: RunConfig, estimates: tuple[MemoryEstimate, ...], plan: PlacementPlan) -> tuple[str, ...]:
    """Devices and nodes of ``plan`` without room for what the roles on them must hold, whatever else they take.

    Roles that reserve nothing are looked at on a cluster of one node only: Ray may put them on another than the plan.
    """
    on_device = {estimate.role: _states(estimate.device) for estimate in estimates}
    on_host = {estimate.role: _states(estimate.host) for estimate in estimates}
    nodes = {node.name: node for node in plan.nodes}
    held: dict[str, dict[str, float]] = {}
    lines = []
    for name, bundle in plan.placed_bundles():
        if bundle.is_empty and len(nodes) > 1:
            continue
        needed, size = _device_bytes(config, bundle, on_device) / GIB, nodes[name].gpu_memory_gib
        if size and needed > size:
            lines.append(
                f"{_users(bundle)} must hold {needed:.1f} GiB of weights and what trains them on a GPU that has "
                f"{size:.1f}: {_mend(config, bundle)}"
            )
        held.setdefault(name, {}).update((f"{m.role}-{m.replica}", on_host[m.role] / GIB) for m in bundle.members)
    for name, sizes in held.items():
        needed, room = sum(sizes.values()), nodes[name].memory_gib
        if room and needed > room:
            lines.append(
                f"{name} has {room:.1f} GiB of memory, and weights and what trains them alone take {needed:.1f}: "
                f"{', '.join(member for member, size in sizes.items() if size)}; spread them over more nodes, take "
                "larger ones, or train adapters or a smaller model"
            )
    return tuple(dict.fromkeys(lines))


def _device_bytes(config: RunConfig, bundle: Bundle, sizes: Mapping[str, float]) -> float:
    """What the roles of ``bundle`` take of one GPU, of ``sizes`` by role; of those that take turns, the larger one."""
    there = {m.role: sizes[m.role] for m in bundle.members if m.gpus}
    turns = [there.pop(role, 0.0) for role in TAKE_TURNS] if config.resources.turns else []
    return sum(there.values()) + max(turns, default=0.0)


def _users(bundle: Bundle) -> str:
    return " and ".join(member.role for member in bundle.members if member.gpus)


def _mend(config: RunConfig, bundle: Bundle) -> str:
    """Which settings make the first role of ``bundle`` smaller."""
    hints = {
        "generator": "raise generation.tensor_parallel_size, or lower generation.kv_cache_gib",
        "learner": "raise learner.ranks or learner.zero_stage, set learner.gradient_checkpointing or learner.offload, "
        "or lower learner.micro_batch_tokens",
        "reward": "raise reward_model.ranks or reward_model.zero_stage, set reward_model.gradient_checkpointing, "
        "or lower reward_model.micro_batch_tokens or reward_model.trainable_layers",
        "reference": "lower reference.micro_batch_tokens, or take larger GPUs",
        "oracle": "lower oracle.micro_batch_size, or take larger GPUs",
    }
    hint = hints[bundle.members[0].role]
    if not config.resources.turns and {m.role for m in bundle.members if m.gpus} >= set(TAKE_TURNS):
        hint += ", or let generator and learner take turns (resources.turns)"
    return hint


def divided_ranks(config: RunConfig, plan: PlacementPlan) -> tuple[str, ...]:
    """One line a setting whose ranks talk in every layer and are laid over several nodes by ``plan``."""
    node_of = {
        member.replica: node
        for node, bundle in plan.placed_bundles()
        for member in bundle.members
        if member.role == "learner"
    }
    lines = []
    for name in ("sequence_parallel", "hybrid_ranks"):
        together: int = getattr(config.learner, name)
        groups = [range(first, first + together) for first in range(0, config.learner.ranks, together)]
        divided = [group for group in groups if len({node_of.get(rank) for rank in group}) > 1]
        if divided:
            ranks, nodes = divided[0], dict.fromkeys(node_of[rank] for rank in divided[0])
            lines.append(
                f"learner.{name} = {together}: {len(divided)} of {len(groups)} groups of ranks that talk in every "
                f"layer lie on several nodes, ranks {ranks[0]} to {ranks[-1]} on {' and '.join(nodes)}: take a number "
                "that divides the ranks of a node, or larger nodes"
            )
    return tuple(lines)


def plan_on(config: RunConfig, nodes: tuple[NodeCapacity, ...]) -> PlacementPlan:
    """The roles of ``config`` laid on ``nodes``."""
    return plan_placement(make_groups(role_requests(config)), nodes)
