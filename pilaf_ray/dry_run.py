"""What a run would do, without starting it: inputs checked, roles placed, memory and budget counted."""

import psutil
from rich.console import Console
from rich.table import Table

from pilaf_ray.build import RunInputs, build_inputs, build_schedule, check_logging, with_warm_start
from pilaf_ray.build_samplers import build_sampler
from pilaf_ray.config.algorithms import PpoConfig, RolloutAlgorithm
from pilaf_ray.config.limits import NO_STEP_LIMIT
from pilaf_ray.config.samplers import labels_per_pair
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ClusterError
from pilaf_ray.float16_roles import slow_float16_roles
from pilaf_ray.memory import GIB, MemoryEstimate
from pilaf_ray.model_copies import with_local_settings
from pilaf_ray.node_memory import read_memory
from pilaf_ray.placement import NodeCapacity, PlacementPlan
from pilaf_ray.resource_plan import (
    cache_shortage,
    cluster_address,
    divided_ranks,
    memory_shortfalls,
    plan_on,
    planned_nodes,
    role_memory,
)
from pilaf_ray.role_formats import role_formats
from pilaf_ray.run_mirror import open_mirror


def print_plan(config: RunConfig) -> None:
    """Check everything that can be known beforehand and print the plan.

    Raises:
        PlacementError: the roles do not fit ``resources.nodes``.
        PilafError: an input is missing or wrong.
    """
    console = Console()
    config = with_warm_start(config)
    open_mirror(config)
    for line in (*config.departures_from_theory, *config.idle_settings, *slow_float16_roles(config)):
        console.print(f"warning: {line}", markup=False)
    check_logging(config)
    local = with_local_settings(config)
    inputs = build_inputs(local)
    estimates = role_memory(local)
    console.print(_roles(config, inputs, estimates))
    console.print(_parts(estimates))
    if shortage := cache_shortage(local):
        console.print(f"warning: {shortage}", markup=False, highlight=False)
    nodes = planned_nodes(config) or _nodes_of_the_run(config, console)
    if nodes is not None:
        _print_placement(console, config, estimates, plan_on(config, nodes))
    train, held_out = inputs.train, inputs.evaluation
    streamed = ", streamed" if config.prompts.train.stream else ""
    lines = [
        f"prompts: {train.count} to train on{streamed}, {len(held_out.prompts)} held out",
        _budget(config),
        *_rollout_lines(config),
        f"cluster: {cluster_address(config) or 'a private one on this machine, unless RAY_ADDRESS is set'}; "
        f"logical CPUs asked for: {config.total_cpus:g}",
        f"run folder: {config.run.folder}/{config.run.name}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _rollout_lines(config: RunConfig) -> list[str]:
    """How the two streams of a run against a reward model share the generators."""
    algorithm = config.algorithm
    if not isinstance(algorithm, RolloutAlgorithm):
        return []
    rollouts, sides = algorithm.batch_responses, 2 * config.learner.batch_pairs
    steps, _ = config.step_limit
    total = f"{steps} steps of " if steps < NO_STEP_LIMIT else "a step: "
    count = f" = {steps * rollouts} responses" if steps < NO_STEP_LIMIT else ""
    return [
        f"rollouts: {total}{algorithm.batch_prompts} prompts × {algorithm.group_size}{count}; of a step's responses "
        f"{rollouts / (rollouts + sides):.0%} are rollouts for the policy and {sides / (rollouts + sides):.0%} sides "
        "of pairs for the oracle"
    ]


def _budget(config: RunConfig) -> str:
    """What the run will spend at most, as far as it is known."""
    steps, reason = config.step_limit
    limits = [
        f"{name} = {limit:g}"
        for name, limit in (
            ("run.max_generated_tokens", config.run.max_generated_tokens),
            ("run.max_seconds", config.run.max_seconds),
        )
        if limit is not None
    ]
    if steps < NO_STEP_LIMIT:
        pairs = build_schedule(config, start_step=0).introduced(steps)
        labels, cost = pairs * labels_per_pair(config.sampler), build_sampler(config).expected_cost
        limits.insert(
            0,
            f"{steps} steps ({reason}) of {config.learner.batch_pairs} pairs = {labels:g} labels, about "
            f"{pairs * cost.sequence_forwards:g} sequence forwards",
        )
    return f"budget: {' or '.join(limits)}; pairs are at most {config.max_age_steps} steps old"


def _nodes_of_the_run(config: RunConfig, console: Console) -> tuple[NodeCapacity, ...] | None:
    """What the cluster of the run has free; None, and said, where it would be joined and cannot be asked from here."""
    if cluster_address(config) in (None, "local"):
        return (_this_machine(config),)
    from pilaf_ray.actors.cluster import ray_cluster
    from pilaf_ray.actors.placement import cluster_nodes

    try:
        # A driver and nothing else: it reserves nothing, and leaves at once.
        with ray_cluster(address=config.resources.address, num_cpus=1):
            return cluster_nodes()
    except ClusterError as error:
        console.print(
            f"placement: not checked ({error}); a run checks it when it has joined the cluster, before any role "
            "starts, or list resources.nodes",
            markup=False,
            highlight=False,
        )
        return None


def _this_machine(config: RunConfig) -> NodeCapacity:
    """The private cluster that the run would start."""
    import torch

    memory = psutil.virtual_memory().available / GIB
    cpus = max(1.0, float(round(config.total_cpus)))
    gpus, size = torch.cuda.device_count(), read_memory().gpu_gib
    return NodeCapacity(name="this machine", cpus=cpus, gpus=gpus, memory_gib=memory, gpu_memory_gib=size)


def _roles(config: RunConfig, inputs: RunInputs, estimates: tuple[MemoryEstimate, ...]) -> Table:
    r = config.resources
    policy, reference = config.model.policy, config.model.reference_path
    zero = f"ZeRO-{config.learner.zero_stage}"
    if (together := config.learner.sequence_parallel) > 1:
        zero += f", rows parted among {together} ranks"
    rows = {
        "generator": (
            config.generation.replicas,
            r.generator,
            config.generation.cpu_threads,
            f"{policy} + {reference}, {inputs.dtype}",
        ),
        "learner": (
            config.learner.ranks,
            r.learner,
            config.learner.cpu_threads,
            f"{policy}, {inputs.precision}, {zero}{' + value model' * isinstance(config.algorithm, PpoConfig)}",
        ),
        "reference": (
            config.reference.replicas,
            r.reference,
            config.reference.cpu_threads,
            f"{reference}, {inputs.reference_dtype}",
        ),
        "oracle": (config.scoring_oracle.replicas, r.oracle, 1, config.scoring_oracle.type),
    }
    if reward := config.reward_model:
        model = f"{reward.path or policy} + scalar head, {role_formats(config).reward}, ZeRO-{reward.zero_stage}"
        rows["reward"] = (reward.ranks, r.reward, reward.cpu_threads, model)
    table = Table("role", "replicas", "CPUs", "GPUs", "threads", "GiB a GPU", "GiB of host", "model")
    table.title = f"run {config.run.name}: each replica"
    for estimate in estimates:
        replicas, asked, threads, model = rows[estimate.role]
        name = {"learner": "policy learner", "reward": "reward model"}.get(estimate.role, estimate.role)
        device = f"{estimate.device_bytes / GIB:.1f}" if estimate.device else ""
        numbers = (str(replicas), f"{asked.cpus:g}", f"{asked.gpus:g}", str(threads))
        table.add_row(name, *numbers, device, f"{estimate.host_bytes / GIB:.1f}", model)
    return table


def _parts(estimates: tuple[MemoryEstimate, ...]) -> Table:
    """Where the memory goes, in GiB."""
    table = Table("role", "where", "estimated GiB by part", box=None)
    for estimate in estimates:
        for where, parts in (("GPU", estimate.device), ("host", estimate.host)):
            if parts:
                table.add_row(estimate.role, where, ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts))
    return table


def _print_placement(
    console: Console, config: RunConfig, estimates: tuple[MemoryEstimate, ...], plan: PlacementPlan
) -> None:
    for line in plan.lines():
        console.print(line, markup=False, highlight=False)
    plan.require()
    for line in (*memory_shortfalls(config, estimates, plan), *divided_ranks(config, plan)):
        console.print(f"warning: {line}", markup=False, highlight=False)
