"""Asking Ray for what the planner laid out."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any
from uuid import uuid4

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from pilaf_ray.actors.calls import asking_ray
from pilaf_ray.errors import ClusterError, PlacementError, RoleLostError
from pilaf_ray.placement import GIB, Bundle, BundleGroup, Member, NodeCapacity


def draining_nodes() -> frozenset[str]:
    """Ray's ids of nodes that are about to leave: preempted, idle, or drained by hand (``ray drain-node``)."""
    # As for what is free a node, Ray has no public call.
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def node_name(node: Mapping[str, Any]) -> str:
    """What a node of ``ray.nodes()`` is called in plans and messages."""
    return f"{node['NodeManagerHostname']}/{node['NodeID'][:8]}"


def cluster_nodes(*, without: frozenset[str] = frozenset()) -> tuple[NodeCapacity, ...]:
    """What every living node of the connected cluster has free, except those with the ids ``without``."""
    # Ray has no public call for what is free a node; this one is there since long, and used by Ray's own libraries.
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return tuple(
        NodeCapacity(
            name=node_name(node),
            cpus=free[node["NodeID"]].get("CPU", 0.0),
            gpus=free[node["NodeID"]].get("GPU", 0.0),
            memory_gib=free[node["NodeID"]].get("memory", 0.0) / GIB,
            labels=tuple(sorted((node.get("Labels") or {}).items())),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] in free and node["NodeID"] not in without
    )


def this_node() -> NodeAffinitySchedulingStrategy:
    """The option ``scheduling_strategy`` of an actor that must be on this process's own node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def store_place(url: str) -> dict[str, Any]:
    """Options for the store's actor: a ledger in a file stays on the driver's node, where console and reports read it.

    SQLite's log is shared memory between its readers and its writer, which works on one machine only.
    """
    return {"scheduling_strategy": this_node()} if url.startswith("sqlite") else {}


async def wait_for_nodes(count: int, *, seconds: float) -> None:
    """Return once ``count`` nodes that have CPUs or GPUs are there, free or not (a head without any does not count).

    Raises:
        ClusterError: fewer nodes have joined after ``seconds``.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    while (joined := _count_working_nodes()) < count:
        if asyncio.get_running_loop().time() > deadline:
            raise ClusterError(
                f"{joined} of the {count} nodes in resources.nodes joined the cluster within {seconds:g} s: look at "
                "the workers' logs, raise resources.start_seconds, or list fewer nodes"
            )
        await asyncio.sleep(0.5)


def _count_working_nodes() -> int:
    totals = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(1 for total in totals if total.get("CPU") or total.get("GPU"))


NodeCheck = Callable[[Sequence[str]], Awaitable[None]]
"""Returns if nodes with these ids are fit for the run; raises ClusterError in one line where they are not."""


class Reservations:
    """Placement groups of a run: one a replica, one a learner, one a colocated set.

    Nodes that come into use later, for newcomers or in the place of lost ones, are checked before anything starts on
    them. One that is not fit is left out from then on: a raylet that is started anew on it is another node to Ray.

    Args:
        check: of such a node; without it all are fit.
    """

    def __init__(self, groups: Sequence[BundleGroup], *, check: NodeCheck | None = None) -> None:
        self._groups = groups
        self._check = check
        self._fit: set[str] = set()
        self._unfit: set[str] = set()
        self._reserved: list[Any] = []
        self._joined: dict[tuple[str, int], Any] = {}
        self._options: dict[tuple[str, int], dict[str, Any]] = {}
        self._places: dict[tuple[str, int], Any] = {}
        """The reservation in which a replica's place is."""
        self._seconds = 120.0

    async def acquire(self, *, seconds: float) -> None:
        """Reserve everything, or nothing; raises PlacementError with the group that was not granted in time."""
        self._seconds = seconds
        deadline = asyncio.get_running_loop().time() + seconds
        wanted = [(group, self._ask(group)) for group in self._groups]
        for group, reserved in wanted:
            try:
                await self._grant(group, reserved, deadline)
            except PlacementError:
                self.release()
                raise

    def node_ids(self) -> tuple[str, ...]:
        """Ray's ids of the nodes on which something is reserved."""
        tables = [placement_group_table(reserved) for reserved in self._reserved]
        return tuple(dict.fromkeys(node for table in tables for node in table["bundles_to_node_id"].values()))

    @property
    def unfit(self) -> frozenset[str]:
        """Ray's ids of nodes that were refused."""
        return frozenset(self._unfit)

    def accept(self) -> None:
        """What is reserved now is on nodes that were checked."""
        self._fit.update(self.node_ids())

    async def granted(self, role: str, replica: int) -> None:
        """Return once the replica's place is there, which it no longer is while a lost node is not replaced.

        Raises:
            RoleLostError: it did not come back in the time that :meth:`acquire` had, or on a node that is not fit;
                then it is asked for elsewhere.
            ClusterError: Ray does not answer.
        """
        if self._places.get((role, replica)) is None:
            return
        deadline = asyncio.get_running_loop().time() + self._seconds
        while not self._is_granted(role, replica):
            if asyncio.get_running_loop().time() > deadline:
                place = self._bundle_of(role, replica)
                raise RoleLostError(
                    f"{role} {replica} has no place: the cluster shrank below the plan, and "
                    f"{place.describe() if place else 'what it needs'} on one node did not come back within "
                    f"{self._seconds:g} s; add a node, or continue with --resume and a smaller plan"
                )
            await asyncio.sleep(0.5)
        try:
            await self._require_fit(role, replica)
        except ClusterError as error:
            self._ask_elsewhere(role, replica)
            raise RoleLostError(f"{role} {replica} came to a node where it cannot be: {error}") from error

    async def _require_fit(self, role: str, replica: int) -> None:
        """Check the nodes of the replica's reservation that are new; ClusterError tells what is wrong with one."""
        if self._check is None:
            return
        with asking_ray(f"the place of {role} {replica}"):
            nodes = placement_group_table(self._places[role, replica])["bundles_to_node_id"].values()
        for node in dict.fromkeys(nodes):
            if node in self._fit:
                continue
            try:
                await self._check([node])
            except ClusterError as error:
                self._unfit.add(node)
                raise ClusterError(f"{error}; it is left out until Ray is started anew on it") from error
            self._fit.add(node)

    def _ask_elsewhere(self, role: str, replica: int) -> None:
        """Give the reservation of ``replica`` back and ask for the same without nodes that are not fit.

        Where other roles have their places in it, they would be ended: it stays.
        """
        group = next((g for g in self._groups if (role, replica) in _members(g)), None) or self._own(role, replica)
        if {name for name, _ in _members(group)} != {role}:
            return
        refused = self._places[role, replica]
        with asking_ray(f"another place for {role} {replica}"):
            remove_placement_group(refused)
            if refused in self._reserved:
                self._reserved.remove(refused)
            self._ask(group)

    def _is_granted(self, role: str, replica: int) -> bool:
        with asking_ray(f"the place of {role} {replica}"):
            return bool(placement_group_table(self._places[role, replica])["state"] == "CREATED")

    async def join(self, role: str, replica: int) -> bool:
        """Reserve for one more replica what replica 0 has; False where it has its place already, or needs none.

        Raises:
            PlacementError: it is not granted in the time that :meth:`acquire` had.
            ClusterError: Ray does not answer, or grants it on a node that is not fit.
        """
        if (role, replica) in self._options or self._bundle_of(role, 0) is None:
            return False
        group = self._own(role, replica)
        try:
            with asking_ray(f"a place for {role} {replica}"):
                reserved = self._ask(group)
                await self._grant(group, reserved, asyncio.get_running_loop().time() + self._seconds)
            if reserved is not None:
                await self._require_fit(role, replica)
        except BaseException:
            self.leave(role, replica)
            raise
        return True

    def _own(self, role: str, replica: int) -> BundleGroup:
        """The group of a replica that is alone in it."""
        alone = self.alone(role, replica)
        return BundleGroup(name=f"{role} {replica}", strategy="pack", bundles=(alone,), settings=())

    def alone(self, role: str, replica: int = 0) -> Bundle:
        """What replica ``replica`` would reserve for itself: as much as replica 0 has, without roles beside it."""
        model = self._bundle_of(role, 0)
        assert model is not None, "nothing is planned for the role"
        (gpus,) = [member.gpus for member in model.members if (member.role, member.replica) == (role, 0)]
        return replace(model, gpus=gpus, members=(Member(role=role, replica=replica, gpus=gpus),))

    def places(self, role: str) -> dict[int, str | None]:
        """Each replica's reserved node, by number; None where the reservation is not granted (any more)."""
        return {number: self.node_of(name, number) for name, number in self._places if name == role}

    def node_of(self, role: str, replica: int) -> str | None:
        """Ray's id of the node on which the replica's place is; None where it has none, or none any more.

        Raises:
            ClusterError: Ray does not answer.
        """
        reserved = self._places.get((role, replica))
        if reserved is None:
            return None
        with asking_ray(f"the place of {role} {replica}"):
            table = placement_group_table(reserved)
        index = self._options[role, replica]["scheduling_strategy"].placement_group_bundle_index
        node: str | None = table["bundles_to_node_id"].get(index) if table["state"] == "CREATED" else None
        return node

    def leave(self, role: str, replica: int) -> None:
        """Give back what one replica has for itself alone; places of the beginning stay reserved for it.

        Raises:
            ClusterError: Ray does not answer.
        """
        reserved = self._joined.get((role, replica))
        if reserved is not None:
            with asking_ray(f"giving back the place of {role} {replica}"):
                remove_placement_group(reserved)
            # Not before: what Ray still reserves is the replica's, if it comes again.
            del self._joined[role, replica]
            self._places.pop((role, replica), None)
        if self._bundle_of(role, replica) is None:
            self._options.pop((role, replica), None)

    def _bundle_of(self, role: str, replica: int) -> Bundle | None:
        bundles = (bundle for group in self._groups for bundle in group.bundles)
        return next((b for b in bundles if any((m.role, m.replica) == (role, replica) for m in b.members)), None)

    def _ask(self, group: BundleGroup) -> Any:
        """Ray's reservation, not granted yet; None where nothing is to be reserved."""
        if all(bundle.is_empty for bundle in group.bundles):
            for bundle in group.bundles:
                self._remember(bundle, {"label_selector": dict(bundle.labels)} if bundle.labels else {})
            return None
        reserved = placement_group(
            [_resources(bundle) for bundle in group.bundles],
            strategy=group.strategy.upper(),
            # Ray wants a new name even where the last holder is being removed.
            name=f"{group.name.replace(' ', '-')}-{uuid4().hex[:8]}",
            bundle_label_selector=_selectors(group, without=self._unfit),
        )
        if group in self._groups:
            self._reserved.append(reserved)
        else:
            (member,) = group.bundles[0].members
            self._joined[(member.role, member.replica)] = reserved
        for index, bundle in enumerate(group.bundles):
            strategy = PlacementGroupSchedulingStrategy(
                reserved, placement_group_bundle_index=index, placement_group_capture_child_tasks=False
            )
            self._remember(bundle, {"scheduling_strategy": strategy})
            self._places |= {(member.role, member.replica): reserved for member in bundle.members}
        return reserved

    async def _grant(self, group: BundleGroup, reserved: Any, deadline: float) -> None:
        """Wait until Ray has granted what was asked for."""
        if reserved is None:
            return
        try:
            async with asyncio.timeout_at(deadline):
                await reserved.ready()
        except TimeoutError as error:
            raise PlacementError(
                f"the cluster did not reserve {len(group.bundles)} x {group.bundles[0].describe()} for "
                f"{group.name} within {self._seconds:g} s; others may have taken it: wait, raise "
                "resources.start_seconds, or ask for less"
            ) from error

    def _remember(self, bundle: Bundle, options: dict[str, Any]) -> None:
        for member in bundle.members:
            # Colocated roles split a bundle's GPUs; alone, a role has them whole.
            self._options[(member.role, member.replica)] = {**options, "num_gpus": member.gpus}

    def options(self, role: str, replica: int) -> dict[str, Any]:
        """Options for ``Actor.options``; empty for a role that nothing was planned for."""
        return self._options.get((role, replica), {})

    def release(self) -> None:
        """Give everything back."""
        for reserved in (*self._reserved, *self._joined.values()):
            remove_placement_group(reserved)
        self._reserved.clear()
        self._joined.clear()


def _resources(bundle: Bundle) -> dict[str, float]:
    amounts = {"CPU": bundle.cpus, "GPU": bundle.gpus, "memory": float(int(bundle.memory_gib * GIB))}
    return {name: amount for name, amount in amounts.items() if amount}


def _selectors(group: BundleGroup, *, without: Set[str]) -> list[dict[str, str]] | None:
    elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(without))})"} if without else {}
    selectors = [dict(bundle.labels) | elsewhere for bundle in group.bundles]
    return selectors if any(selectors) else None


def _members(group: BundleGroup) -> set[tuple[str, int]]:
    return {(member.role, member.replica) for bundle in group.bundles for member in bundle.members}
