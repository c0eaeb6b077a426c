"""KubeRay, by ``kubectl`` on RayJob objects."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pilaf_ray.errors import ClusterError
from pilaf_ray.placement import GIB, NodeCapacity, RoleRequest, make_groups, plan_placement
from pilaf_ray.submission.job import Job, render
from pilaf_ray.submission.schedulers import JobStatus, run_client, stream_client

SAVE_SECONDS = 180.0
"""Deadline of a stop: the manifest gives the driver 120 s to save."""
LOOK_SECONDS = 20.0
"""Deadline of a look at the nodes: it warns, and a submission goes on without it."""
HEAD_CPUS, HEAD_GIB = 2.0, 8.0
"""What the manifest asks of the head's node."""
_ENDED = ("Complete", "Failed")
"""States of a RayJob's deployment from which nothing follows any more; every other one is or becomes a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a job's driver runs."""

    head: str
    """``pod/NAME`` of the head."""
    job_id: str
    """Ray's own id of the job."""


class KubeRay:
    """``kubectl`` on RayJob objects of one namespace."""

    def __init__(self, namespace: str = "default") -> None:
        self._namespace = namespace

    def submit(self, job: Job) -> str:
        """Create the RayJob; one that has ended makes room first, because applied again it would stay ended.

        Raises:
            ClusterError: the job is under way.
        """
        state = self._state(job.name)
        if state is not None and state not in _ENDED:
            raise ClusterError(
                f"{job.name} is running ({state or 'New'}) in namespace {self._namespace}: follow it with `logs`, "
                "end it with `stop`, or choose another run.name"
            )
        if state is not None:
            self._delete(job.name)
        ((_, text),) = render(job, "kuberay").items()
        run_client(self._command("apply", "--filename", "-"), text=text)
        return job.name

    def jobs(self) -> list[JobStatus]:
        """RayJobs that carry this project's label."""
        columns = "custom-columns=:metadata.name,:status.jobStatus,:status.jobDeploymentStatus"
        selector = "--selector=app.kubernetes.io/name=pilaf-ray"
        command = self._command("get", "rayjobs.ray.io", selector, "--no-headers", "--output", columns)
        rows = [line.split() for line in run_client(command).splitlines() if line.strip()]
        return [JobStatus(job_id=name, name=name, state=" ".join(state)) for name, *state in rows]

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        """The driver's output, as long as its cluster is there."""
        self._required_state(job_id)
        place = self._place(job_id)
        if place is None:
            raise ClusterError(f"{job_id} has no cluster; its state is in 'pilaf-ray jobs --to kuberay'")
        followed = ["--follow"] if follow else []
        stream_client(self._in(place, "ray", "job", "logs", *followed, place.job_id), write)

    def stop(self, job_id: str) -> None:
        """The driver saves and ends, then its cluster and the RayJob are removed.

        Raises:
            ClusterError: the driver could not be told, or was not done in time; nothing is removed then.
        """
        # In every other state no driver runs: its cluster comes, goes, or waits for room.
        running = self._required_state(job_id) == "Running"
        place = self._place(job_id) if running else None
        if place is not None:
            try:
                # It returns when the driver has ended.
                run_client(self._in(place, "ray", "job", "stop", place.job_id), seconds=SAVE_SECONDS)
            except ClusterError as error:
                raise ClusterError(
                    f"{error}; {job_id} is still there: try again, or give up what it has not saved with "
                    f"`{' '.join(self._command('delete', 'rayjob', job_id))}`"
                ) from error
        self._delete(job_id)

    def _state(self, name: str) -> str | None:
        """Of the RayJob's deployment: empty where KubeRay has not looked at it yet, None where there is none."""
        fields = "jsonpath={.metadata.name} {.status.jobDeploymentStatus}"
        found = run_client(self._command("get", "rayjob", name, "--ignore-not-found", "--output", fields))
        _, _, state = found.strip().partition(" ")
        return state if found.strip() else None

    def _required_state(self, job_id: str) -> str:
        state = self._state(job_id)
        if state is None:
            raise ClusterError(f"there is no job '{job_id}' in namespace {self._namespace}")
        return state

    def _place(self, job_id: str) -> _Place | None:
        """None while no cluster is there, or no more."""
        fields = "jsonpath={.status.rayClusterName} {.status.jobId}"
        cluster = run_client(self._command("get", "rayjob", job_id, "--output", fields)).split()
        if len(cluster) < 2:
            return None
        selector = f"ray.io/cluster={cluster[0]},ray.io/node-type=head"
        heads = run_client(self._command("get", "pods", f"--selector={selector}", "--output", "name")).split()
        return _Place(head=heads[0], job_id=cluster[1]) if heads else None

    def _in(self, place: _Place, *words: str) -> list[str]:
        return self._command("exec", place.head, "--", *words)

    def _delete(self, name: str) -> None:
        run_client(self._command("delete", "rayjob", name, "--wait=true"))

    def _command(self, verb: str, *words: str) -> list[str]:
        return ["kubectl", verb, "--namespace", self._namespace, *words]


def room_warnings(job: Job) -> tuple[str, ...]:
    """Pods that would wait for room on the nodes that Kubernetes has now, whatever else runs on them.

    A warning only: an autoscaler may add nodes. Empty also where there is no ``kubectl`` here, or the nodes may not be
    listed, as users of one namespace often may not.
    """
    if shutil.which("kubectl") is None:
        return ()
    try:
        listing = run_client(["kubectl", "get", "nodes", "--output", "json"], seconds=LOOK_SECONDS)
        nodes = tuple(_capacity(node) for node in json.loads(listing)["items"] if _takes_pods(node))
    except (ClusterError, ValueError, KeyError):
        return ()
    head = RoleRequest(role="pod head", replicas=1, cpus=HEAD_CPUS, memory_gib=HEAD_GIB)
    workers = [
        RoleRequest(
            role=f"pod nodes-{kind}",
            replicas=node.count,
            cpus=float(int(node.cpus)),
            gpus=float(int(node.gpus)),
            memory_gib=float(int(node.memory_gib)),
            setting=f"resources.nodes[{kind}]",
        )
        for kind, node in enumerate(job.nodes)
    ]
    short = plan_placement(make_groups([head, *workers]), nodes).shortfalls
    return tuple(f"as Kubernetes' nodes are now, pods would wait: {line}" for line in short)


def _takes_pods(node: dict[str, Any]) -> bool:
    """Whether a node is ready, and nobody has closed it to new pods."""
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))
    return ready and not node.get("spec", {}).get("unschedulable", False)


def _capacity(node: dict[str, Any]) -> NodeCapacity:
    allocatable = node["status"]["allocatable"]
    return NodeCapacity(
        name=node["metadata"]["name"],
        cpus=_quantity(allocatable["cpu"]),
        gpus=_quantity(allocatable.get("nvidia.com/gpu", "0")),
        memory_gib=_quantity(allocatable["memory"]) / GIB,
    )


def _quantity(text: str) -> float:
    """A quantity as Kubernetes writes it, e.g. ``3920m``, ``16Gi`` or ``8``."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    for unit, factor in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)
