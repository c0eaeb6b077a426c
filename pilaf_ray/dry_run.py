"""What a run would do, without starting it: inputs checked, roles placed, budget counted."""

from rich.console import Console
from rich.table import Table

from pilaf_ray.build import build_inputs
from pilaf_ray.config.schema import RunConfig


def print_plan(config: RunConfig) -> None:
    """Check everything that can be known beforehand and print the plan; raises PilafError."""
    console = Console()
    for line in config.departures_from_theory:
        console.print(f"warning: {line}", markup=False)
    inputs = build_inputs(config)
    r = config.resources
    table = Table("role", "replicas", "CPUs each", "GPUs each", "threads each", "model", title=f"run {config.run.name}")
    roles = [
        (
            "generator",
            config.generation.replicas,
            r.generator.cpus,
            r.generator.gpus,
            config.generation.cpu_threads,
            f"{config.model.policy} + {config.model.reference_path}, {inputs.dtype}",
        ),
        (
            "reference",
            config.reference.replicas,
            r.reference.cpus,
            r.reference.gpus,
            config.reference.cpu_threads,
            f"{config.model.reference_path}, {inputs.dtype}",
        ),
        ("oracle", config.oracle.replicas, r.oracle.cpus, r.oracle.gpus, 1, config.oracle.type),
        (
            "policy learner",
            config.learner.ranks,
            r.learner.cpus,
            r.learner.gpus,
            config.learner.cpu_threads,
            f"{config.model.policy}, {inputs.precision}, ZeRO-{config.learner.zero_stage}",
        ),
    ]
    for role, replicas, cpus, gpus, threads, model in roles:
        table.add_row(role, str(replicas), f"{cpus:g}", f"{gpus:g}", str(threads), model)
    console.print(table)
    train, held_out = inputs.train, inputs.evaluation
    pairs = config.run.max_steps * config.learner.batch_pairs
    lines = [
        f"prompts: {len(train.prompts)} to train on, {len(held_out.prompts)} held out",
        f"budget: {config.run.max_steps} steps of {config.learner.batch_pairs} pairs = {pairs} labels; "
        f"pairs are at most {config.pipeline.max_staleness_steps} steps old",
        f"cluster: {config.resources.address or 'a private one on this machine, unless RAY_ADDRESS is set'}; "
        f"logical CPUs asked for: {config.total_cpus:g}",
        f"run folder: {config.run.folder}/{config.run.name}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
