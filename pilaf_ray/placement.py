"""Who runs where: arithmetic on numbers, before any cluster is asked for anything.

Roles become groups of *bundles* (what Ray reserves together), and the groups are laid on
nodes: the largest bundle first, into as few nodes as its strategy allows. Ray packs by its own
rules, so a plan that fits says that a placement exists, not which one Ray takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pilaf_ray.errors import ConfigError, PlacementError

Strategy = Literal["pack", "strict_pack", "spread", "strict_spread"]
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleRequest:
    """What the replicas of one role ask for, each.

    ``gang``: all replicas (ranks) are reserved together or not at all. ``setting`` and
    ``count_setting`` are the configuration keys that a message names.
    """

    role: str
    replicas: int
    cpus: float = 0.0
    gpus: float = 0.0
    memory_gib: float = 0.0
    labels: tuple[tuple[str, str], ...] = ()
    colocate: str | None = None
    gang: bool = False
    strategy: Strategy = "pack"
    setting: str = ""
    count_setting: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One replica in a bundle, and the part of the bundle's GPUs that it takes."""

    role: str
    replica: int
    gpus: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """What one node must have free at once."""

    cpus: float
    gpus: float
    memory_gib: float
    labels: tuple[tuple[str, str], ...]
    members: tuple[Member, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is reserved, so that any node will do."""
        return not (self.cpus or self.gpus or self.memory_gib)

    def describe(self) -> str:
        """E.g. ``8 GPUs, 4 CPUs``."""
        parts = [_amount(self.gpus, "GPU"), _amount(self.cpus, "CPU")]
        if self.memory_gib:
            parts.append(f"{self.memory_gib:g} GiB")
        return ", ".join(part for part in parts if not part.startswith("0 ")) or "nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleGroup:
    """Bundles that are reserved together."""

    name: str
    strategy: Strategy
    bundles: tuple[Bundle, ...]
    settings: tuple[str, ...]
    """Keys that would mend a shortfall."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCapacity:
    """One node: what it has free."""

    name: str
    cpus: float
    gpus: float = 0.0
    memory_gib: float = 0.0
    labels: tuple[tuple[str, str], ...] = ()
    gpu_memory_gib: float = 0.0
    """What one GPU has, whoever uses it; 0 where it is not known."""

    def holds(self, bundle: Bundle) -> bool:
        """Whether there is room for ``bundle``."""
        slack = 1e-6
        return (
            self.cpus + slack >= bundle.cpus
            and self.gpus + slack >= bundle.gpus
            and self.memory_gib + slack >= bundle.memory_gib
            and self.matches(bundle)
        )

    def matches(self, bundle: Bundle) -> bool:
        """Whether the labels are those that ``bundle`` wants."""
        return set(bundle.labels) <= set(self.labels)

    def without(self, bundle: Bundle) -> "NodeCapacity":
        """What is left after ``bundle``."""
        return replace(
            self,
            cpus=self.cpus - bundle.cpus,
            gpus=self.gpus - bundle.gpus,
            memory_gib=self.memory_gib - bundle.memory_gib,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementPlan:
    """Groups of bundles, the node of each bundle, and what did not fit."""

    groups: tuple[BundleGroup, ...]
    nodes: tuple[NodeCapacity, ...] = ()
    assigned: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Node names by group, one a bundle; only groups that fit."""
    shortfalls: tuple[str, ...] = ()

    def placed_bundles(self) -> Iterator[tuple[str, Bundle]]:
        """Each bundle of a group that fits, after the name of its node."""
        for group in (group for group in self.groups if group.name in self.assigned):
            yield from zip(self.assigned[group.name], group.bundles, strict=True)

    def members_by_node(self) -> dict[str, list[str]]:
        """``role-replica`` names on each node that has any."""
        placed: dict[str, list[str]] = {}
        for node, bundle in self.placed_bundles():
            placed.setdefault(node, []).extend(f"{m.role}-{m.replica}" for m in bundle.members)
        return placed

    def lines(self) -> tuple[str, ...]:
        """One line a node that has any: who would be there."""
        return tuple(f"{node}: {', '.join(members)}" for node, members in sorted(self.members_by_node().items()))

    def require(self) -> None:
        """Raise PlacementError with every shortfall, if there is one."""
        if self.shortfalls:
            raise PlacementError("; ".join(self.shortfalls))


def make_groups(requests: Sequence[RoleRequest]) -> tuple[BundleGroup, ...]:
    """Groups in the order of ``requests``; raises ConfigError for a colocation that cannot be."""
    groups: list[BundleGroup] = []
    shared: dict[str, list[RoleRequest]] = {}
    for request in requests:
        if request.colocate is not None:
            shared.setdefault(request.colocate, []).append(request)
            continue
        bundles = tuple(_bundle([request], replica) for replica in range(request.replicas))
        groups.extend(_as_groups(request.role, [request], bundles))
    for name, members in shared.items():
        _check_colocation(name, members)
        count = max(request.replicas for request in members)
        bundles = tuple(_bundle([r for r in members if replica < r.replicas], replica) for replica in range(count))
        groups.extend(_as_groups(name, members, bundles))
    return tuple(groups)


def _as_groups(name: str, requests: Sequence[RoleRequest], bundles: tuple[Bundle, ...]) -> Iterator[BundleGroup]:
    gang = next((request for request in requests if request.gang), None)
    settings = tuple(key for r in requests for key in (r.count_setting, r.setting) if key)
    if gang is not None:
        yield BundleGroup(name=name, strategy=gang.strategy, bundles=bundles, settings=settings)
        return
    for number, bundle in enumerate(bundles):
        yield BundleGroup(name=f"{name}-{number}", strategy="pack", bundles=(bundle,), settings=settings)


def _bundle(requests: Sequence[RoleRequest], replica: int) -> Bundle:
    gpus = max(request.gpus for request in requests)
    users = sum(1 for request in requests if request.gpus)
    share = gpus / users if len(requests) > 1 and users else None
    return Bundle(
        cpus=sum(request.cpus for request in requests),
        gpus=gpus,
        memory_gib=sum(request.memory_gib for request in requests),
        labels=tuple(sorted({pair for request in requests for pair in request.labels})),
        members=tuple(
            Member(role=r.role, replica=replica, gpus=share if share and r.gpus else r.gpus) for r in requests
        ),
    )


def _check_colocation(name: str, members: Sequence[RoleRequest]) -> None:
    for request in members:
        if request.gpus > 1:
            raise ConfigError(
                f"{request.setting}.gpus = {request.gpus:g} with colocate: {name}: roles share single GPUs only; "
                "set gpus to 1, or drop colocate"
            )
    for key in {key for request in members for key, _ in request.labels}:
        wanted = {value for request in members for other, value in request.labels if other == key}
        if len(wanted) > 1:
            raise ConfigError(
                f"roles with colocate: {name} ask for different nodes ({key}: {', '.join(sorted(wanted))}): "
                "give them the same node_labels"
            )


def plan_placement(groups: Sequence[BundleGroup], nodes: Sequence[NodeCapacity]) -> PlacementPlan:
    """Lay ``groups`` on ``nodes``; what does not fit is in ``shortfalls``, one line a group."""
    free = {node.name: node for node in nodes}
    assigned: dict[str, tuple[str, ...]] = {}
    homeless: dict[tuple[str, ...], list[BundleGroup]] = {}
    for group in sorted(groups, key=_size, reverse=True):
        chosen = _place(group, free)
        if chosen is None:
            # Replicas of one role fail alike, and are told together.
            homeless.setdefault(group.settings or (group.name,), []).append(group)
            continue
        for name, bundle in zip(chosen, group.bundles, strict=True):
            free[name] = free[name].without(bundle)
        assigned[group.name] = chosen
    shortfalls = tuple(_explain(alike[0], len(alike), nodes, free) for alike in homeless.values())
    return PlacementPlan(groups=tuple(groups), nodes=tuple(nodes), assigned=assigned, shortfalls=shortfalls)


def _size(group: BundleGroup) -> tuple[float, float, float, float]:
    """The hardest to place come first: groups bound to one node, then large bundles, then large groups."""
    whole = group.strategy == "strict_pack"
    count = len(group.bundles) if whole else 1
    largest = max(group.bundles, key=lambda b: (b.gpus, b.cpus))
    total = sum(bundle.gpus for bundle in group.bundles)
    return largest.gpus * count, total, largest.cpus * count, largest.memory_gib * count


def _place(group: BundleGroup, free: dict[str, NodeCapacity]) -> tuple[str, ...] | None:
    """A node for each bundle, or None."""
    if group.strategy in ("pack", "strict_pack"):
        # The fullest node that takes them all, so that larger holes stay for others.
        for name in sorted(free, key=lambda n: (free[n].gpus, free[n].cpus)):
            if _fill(group.bundles, {name: free[name]}, spread=False) is not None:
                return (name,) * len(group.bundles)
        if group.strategy == "strict_pack":
            return None
    chosen = _fill(group.bundles, free, spread=group.strategy != "pack")
    if group.strategy == "strict_spread" and chosen is not None and len(set(chosen)) < len(chosen):
        return None
    return chosen


def _fill(bundles: Sequence[Bundle], nodes: dict[str, NodeCapacity], *, spread: bool) -> tuple[str, ...] | None:
    """Bundle by bundle: onto a node in use with room (pack), or onto the least used one (spread)."""
    left = dict(nodes)
    used = dict.fromkeys(nodes, 0)
    chosen = []
    for bundle in bundles:
        fitting = [name for name, node in left.items() if node.holds(bundle)]
        if not fitting:
            return None
        sign = 1 if spread else -1
        name = min(fitting, key=lambda n: (sign * used[n], -left[n].gpus, -left[n].cpus))
        left[name] = left[name].without(bundle)
        used[name] += 1
        chosen.append(name)
    return tuple(chosen)


def _explain(group: BundleGroup, count: int, nodes: Sequence[NodeCapacity], free: dict[str, NodeCapacity]) -> str:
    """What ``count`` groups like ``group`` miss, in one line, with the keys that mend it."""
    name = group.name if count == 1 else f"{group.name} and {count - 1} more like it"
    mend = f"lower {' or '.join(group.settings)}" if group.settings else "ask for less"
    if not nodes:
        return f"{name} needs {group.bundles[0].describe()}; the cluster has no nodes"
    largest = max(group.bundles, key=lambda b: (b.gpus, b.cpus))
    labelled = [node for node in nodes if node.matches(largest)]
    if not labelled:
        wanted = ", ".join(f"{key}={value}" for key, value in largest.labels)
        return f"{name} wants nodes labelled {wanted}; no node is: change node_labels, or label a node"
    whole = _total(group) if group.strategy == "strict_pack" else largest
    if not any(node.holds(whole) for node in labelled):
        best = max(labelled, key=lambda n: (n.gpus, n.cpus, n.memory_gib))
        hint = ", or set resources.learner.strategy: pack" if group.strategy == "strict_pack" else ""
        return (
            f"{name} needs {whole.describe()} on one node; the largest node has "
            f"{_describe(best, whole)} free: {mend}{hint}, or use larger nodes"
        )
    if group.strategy == "strict_spread" and len(group.bundles) > len(labelled):
        return f"{name} needs {len(group.bundles)} nodes; there are {len(labelled)}: {mend}, or spread less"
    after = "; ".join(
        f"{node.name} {_describe(free[node.name], whole)}" for node in sorted(labelled, key=lambda n: n.name)[:4]
    )
    many = f"{len(group.bundles)} x " if len(group.bundles) > 1 and group.strategy != "strict_pack" else ""
    more = f" and {len(labelled) - 4} more" if len(labelled) > 4 else ""
    return (
        f"{name} needs {many}{whole.describe()}; beside the other roles the nodes have left: "
        f"{after}{more}: {mend}, or add nodes"
    )


def _total(group: BundleGroup) -> Bundle:
    return replace(
        group.bundles[0],
        cpus=sum(b.cpus for b in group.bundles),
        gpus=sum(b.gpus for b in group.bundles),
        memory_gib=sum(b.memory_gib for b in group.bundles),
    )


def _describe(node: NodeCapacity, wanted: Bundle) -> str:
    parts = [_amount(node.gpus, "GPU")] if wanted.gpus or node.gpus else []
    parts.append(_amount(node.cpus, "CPU"))
    if wanted.memory_gib:
        parts.append(f"{node.memory_gib:.0f} GiB")
    return ", ".join(parts)


def _amount(value: float, unit: str) -> str:
    return f"{value:g} {unit}" + ("" if value == 1 else "s")
