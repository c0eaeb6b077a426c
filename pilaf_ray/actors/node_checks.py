"""Asking the nodes of a run what they are, before anything is loaded on them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pilaf_ray.actors.placement import Reservations, node_name
from pilaf_ray.errors import ClusterError
from pilaf_ray.node_agreement import NodeFacts, read_facts, require_agreement
from pilaf_ray.node_memory import NodeMemory, read_memory
from pilaf_ray.placement import PlacementPlan


async def reserve_fit_nodes(plan: PlacementPlan, *, folder: Path, seconds: float) -> Reservations:
    """What ``plan`` asks for, on nodes that :func:`require_fit_nodes` accepts, as are those that are used later.

    The plan's own nodes are asked before anything is held. Ray may pack otherwise: nodes that it chose instead are
    asked afterwards, and everything is given back where they are not fit.

    Raises:
        PlacementError: the cluster does not grant it within ``seconds``.
        ClusterError: as :func:`require_fit_nodes`.
    """
    by_name = {name: node for node, name in _names().items()}
    planned = [by_name[name] for names in plan.assigned.values() for name in names if name in by_name]
    check = partial(require_fit_nodes, folder=folder, seconds=seconds)
    await check(planned)
    reservations = Reservations(plan.groups, check=check)
    await reservations.acquire(seconds=seconds)
    try:
        await check([node for node in reservations.node_ids() if node not in planned])
        reservations.accept()
    except BaseException:
        reservations.release()
        raise
    return reservations


async def as_reserved(plan: PlacementPlan, reservations: Reservations, *, seconds: float) -> PlacementPlan:
    """``plan`` as Ray granted it, on nodes with all the memory that they have, be it free or not.

    Roles that reserve nothing stay where the planner put them.

    Raises:
        ClusterError: a node does not answer within ``seconds``.
    """
    names = _names()
    granted = {
        group.name: tuple(reservations.node_of(b.members[0].role, b.members[0].replica) for b in group.bundles)
        for group in plan.groups
    }
    placed = {name: tuple(names[node] for node in nodes if node) for name, nodes in granted.items() if all(nodes)}
    assigned = plan.assigned | placed
    used = {name for chosen in assigned.values() for name in chosen}
    asked = {name: _memory(node, name, seconds) for node, name in names.items() if name in used}
    memory = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
    nodes = tuple(
        replace(node, memory_gib=memory[node.name].host_gib, gpu_memory_gib=memory[node.name].gpu_gib)
        if node.name in memory
        else node
        for node in plan.nodes
    )
    return replace(plan, nodes=nodes, assigned=assigned)


async def _memory(node: str, name: str, seconds: float) -> NodeMemory:
    if node == ray.get_runtime_context().get_node_id():
        return read_memory()
    found: NodeMemory = await _on_node(node, name, seconds, read_memory)
    return found


async def require_fit_nodes(node_ids: Sequence[str], *, folder: Path, seconds: float) -> None:
    """Return if the nodes have the driver's packages, code and run folder; a run on one node is not asked.

    Raises:
        ClusterError: in one line, which nodes differ in what, or do not answer.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in dict.fromkeys(node_ids) if node != here]
    if not others:
        return
    names = _names()
    token = uuid4().hex
    marker = (folder / f".seen-{token[:8]}").resolve()
    marker.write_text(token)
    try:
        asked = [_facts(names[node], node, marker, token, seconds) for node in others]
        facts = await asyncio.gather(*asked)
    finally:
        marker.unlink()
    require_agreement(
        NodeFacts(node=names[here], versions=read_facts(names[here], marker, token).versions, sees_folder=True),
        facts,
        folder=folder.resolve(),
    )


def _names() -> dict[str, str]:
    """What the planner calls each node, by Ray's id."""
    return {node["NodeID"]: node_name(node) for node in ray.nodes()}


async def _facts(name: str, node: str, marker: Path, token: str, seconds: float) -> NodeFacts:
    facts: NodeFacts = await _on_node(node, name, seconds, read_facts, name, marker, token)
    return facts


async def _on_node(node: str, name: str, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns there; raises ClusterError with the node's ``name``."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    remote = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        async with asyncio.timeout(seconds):
            return await remote.remote(*arguments)
    except TimeoutError as error:
        raise ClusterError(f"node {name} ran nothing within {seconds:g} s: look at its raylet's log") from error
    except RayError as error:
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        raise ClusterError(
            f"node {name} cannot run pilaf_ray ({reason}): install the driver's environment on every node"
        ) from error
