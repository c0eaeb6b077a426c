"""What each role asks of the cluster, and what the cluster has."""

from typing import Literal

from pydantic import Field

from pilaf_ray.config.base import Section


class RoleResourcesConfig(Section):
    """What one replica (of the learner: one rank) reserves."""

    cpus: float = Field(default=0.0, ge=0)
    """CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs; a generator needs generation.tensor_parallel_size of them."""
    memory_gib: float = Field(default=0.0, ge=0)
    """Host memory to reserve; 0 reserves none."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Only nodes with these Ray labels."""
    colocate: str | None = None
    """Roles with the same name here share devices: replica i of each on the same GPU."""


class EngineResourcesConfig(RoleResourcesConfig):
    """A role that computes all the time."""

    cpus: float = Field(default=1.0, ge=0)
    """CPUs."""


class LearnerResourcesConfig(EngineResourcesConfig):
    """One rank of the learner."""

    strategy: Literal["pack", "strict_pack", "spread", "strict_spread"] = "pack"
    """How ranks lie on nodes: as few nodes as possible, exactly one, evenly, one rank a node."""


class NodeConfig(Section):
    """Some equal nodes of a cluster."""

    count: int = Field(default=1, ge=1)
    """How many."""
    cpus: float = Field(gt=0)
    """CPUs of each."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each."""
    memory_gib: float = Field(gt=0)
    """Host memory of each."""
    gpu_memory_gib: float = Field(default=0.0, ge=0)
    """Memory of one GPU; 0 if it is not to be checked."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of each."""


class ResourcesSection(Section):
    """Where roles run and what they reserve."""

    address: str | None = None
    """Ray cluster to join; RAY_ADDRESS, else a private local one."""
    start_seconds: float = Field(default=120.0, gt=0)
    """How long to wait for the cluster to grant all reservations."""
    generator: EngineResourcesConfig = EngineResourcesConfig()
    """A generator replica."""
    learner: LearnerResourcesConfig = LearnerResourcesConfig()
    """A learner rank."""
    reward: LearnerResourcesConfig = LearnerResourcesConfig()
    """A rank of the reward model, where there is one."""
    reference: RoleResourcesConfig = RoleResourcesConfig()
    """A reference replica."""
    oracle: RoleResourcesConfig = RoleResourcesConfig()
    """An oracle replica."""
    turns: bool = False
    """Generator and learner, which must colocate, use their devices in turns: one rests while the other works."""
    nodes: list[NodeConfig] = Field(default_factory=list)
    """The cluster to plan for and to submit to, where it cannot be asked."""


def check_transport(resources: ResourcesSection, transport: str) -> None:
    """Raise ValueError where new weights cannot take that way between the roles as they are placed."""
    without = [role for role in ("generator", "learner") if getattr(resources, role).gpus < 1]
    if transport == "nccl" and without:
        raise ValueError(
            f"weights.transport: nccl moves weights between GPUs, and resources.{without[0]}.gpus is 0: "
            "give both generator and learner whole GPUs, or set weights.transport: gloo"
        )
    nodes = sum(node.count for node in resources.nodes)
    if transport == "shared_memory" and nodes > 1:
        raise ValueError(
            f"weights.transport: shared_memory reaches generators on the learner's node only, and resources.nodes "
            f"describes {nodes}: set weights.transport: gloo"
        )


def check_turns(resources: ResourcesSection, *, rollouts: str | None, transport: str, to_disk: bool) -> None:
    """Raise ValueError where generator and learner are to take turns and cannot.

    Args:
        rollouts: the algorithm whose steps sample for themselves, if it is one of those.
        transport: of new weights.
        to_disk: whether the learner keeps a part of itself there.
    """
    if not resources.turns:
        return
    if resources.generator.colocate is None or resources.generator.colocate != resources.learner.colocate:
        raise ValueError(
            "resources.turns is for a generator and a learner on the same devices: give resources.generator and "
            "resources.learner the same colocate, or leave resources.turns out"
        )
    if rollouts is not None:
        raise ValueError(
            f"resources.turns cannot serve algorithm.type: {rollouts}, whose steps wait for rollouts while they are "
            "under way: set algorithm.type: dpo, or give the roles devices of their own"
        )
    if transport == "nccl":
        raise ValueError(
            "weights.transport: nccl needs generator and learner on GPUs of their own, and resources.turns has them "
            "share: set weights.transport: gloo"
        )
    if to_disk:
        raise ValueError(
            "resources.turns moves the learner to the host, and learner.offload keeps it on a disk: offload to cpu, or "
            "leave resources.turns out"
        )
