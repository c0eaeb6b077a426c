"""From the configuration to running roles: room for all of them first, then all of them at the same time."""

import asyncio
from typing import Any

from rich.console import Console

from pilaf_ray import build
from pilaf_ray.actors.launch import RoleLauncher, RoleResources, Roles
from pilaf_ray.actors.learner_group import RewardGroup
from pilaf_ray.actors.node_checks import as_reserved, reserve_fit_nodes
from pilaf_ray.actors.placement import Reservations, cluster_nodes, wait_for_nodes
from pilaf_ray.build_rewards import reward_arguments
from pilaf_ray.config.resources import RoleResourcesConfig
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.memory_checks import check_memory
from pilaf_ray.model_copies import with_local_settings
from pilaf_ray.people_run import ask_people, serve_console
from pilaf_ray.pipeline.supervision import Report
from pilaf_ray.pipeline.turns import TurnTaking
from pilaf_ray.resource_plan import plan_on
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.store.location import ledger_location
from pilaf_ray.threads import Threads


async def start_roles(
    config: RunConfig, inputs: build.RunInputs, folder: RunFolder, *, report: Report, console: Console
) -> Roles:
    """Every role of the run, loaded and answering.

    Raises:
        PilafError: a role has no room, or does not start.
    """
    reservations = await _reserve(config, folder, console)
    turns = TurnTaking() if config.resources.turns else None
    launcher = RoleLauncher(
        logs=str(folder.logs.resolve()),
        call_seconds=config.pipeline.call_seconds,
        reservations=reservations,
        policy=build.supervision_policy(config),
        outage_seconds=config.supervision.oracle_outage_seconds,
        report=report,
        turns=turns,
    )
    location = ledger_location(folder.path, url=config.store.url)
    generation, scorer, resources = config.generation, config.scoring_oracle, config.resources
    generators, reference, oracle, learner, store, reward = await asyncio.gather(
        launcher.generators(
            build.generator_arguments(config, inputs),
            replicas=generation.replicas,
            resources=_share(resources.generator, threads=generation.cpu_threads),
        ),
        launcher.reference(
            build.reference_arguments(config, inputs),
            replicas=config.reference.replicas,
            resources=_share(resources.reference, threads=config.reference.cpu_threads),
        ),
        launcher.oracle(
            scorer.type,
            build.oracle_arguments(scorer, gpus=resources.oracle.gpus),
            replicas=scorer.replicas,
            resources=_share(resources.oracle, threads=1),
        ),
        launcher.learner(
            build.learner_arguments(config, inputs, folder),
            _publisher(config, folder),
            ranks=config.learner.ranks,
            resources=_share(resources.learner, threads=config.learner.cpu_threads),
        ),
        launcher.store(location.url, location.namespace),
        _reward(config, folder, launcher),
    )
    labels = await ask_people(config, folder, launcher, store, oracle, reward)
    return Roles(
        generators=generators,
        reference=reference,
        oracle=labels,
        learner=learner,
        store=store,
        reward=reward,
        console=await serve_console(config, folder, store, console),
        reservations=reservations,
        turns=turns,
    )


def _publisher(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """What the learner publishes its weights with: arguments of ``make_publisher``."""
    return {
        "transport": config.weights.transport,
        "folder": str((folder.path / "weights").resolve()),
        "timeout_seconds": config.weights.deadline_seconds,
        # Each worker of an engine fetches for itself.
        "relay": config.generation.replicas * config.generation.tensor_parallel_size if config.weights.relay else 1,
    }


async def _reserve(config: RunConfig, folder: RunFolder, console: Console) -> Reservations:
    """Everything that the roles need, before any of them starts to load; warnings about memory go to ``console``."""
    seconds = config.resources.start_seconds
    await wait_for_nodes(sum(node.count for node in config.resources.nodes), seconds=seconds)
    plan = plan_on(config, cluster_nodes())
    plan.require()
    reservations = await reserve_fit_nodes(plan, folder=folder.path, seconds=seconds)
    try:
        granted = await as_reserved(plan, reservations, seconds=seconds)
        for line in check_memory(with_local_settings(config), granted):
            console.print(f"warning: {line}", markup=False, highlight=False)
    except BaseException:
        reservations.release()
        raise
    return reservations


async def _reward(config: RunConfig, folder: RunFolder, launcher: RoleLauncher) -> RewardGroup | None:
    reward = config.reward_model
    if reward is None:
        return None
    return await launcher.reward(
        reward_arguments(config, folder),
        ranks=reward.ranks,
        resources=_share(config.resources.reward, threads=reward.cpu_threads),
    )


def _share(settings: RoleResourcesConfig, *, threads: Threads) -> RoleResources:
    return RoleResources(num_cpus=settings.cpus, num_gpus=settings.gpus, threads=threads)
