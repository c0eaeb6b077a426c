"""What KubeRay is asked through ``kubectl``, in which order, and what its answers are taken for."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from submission_example import FakeClient, example

from pilaf_ray.errors import ClusterError
from pilaf_ray.submission.job import render
from pilaf_ray.submission.kuberay import HEAD_CPUS, HEAD_GIB, KubeRay, room_warnings

NAME = "pilaf-llama3-8b-hh"
TEAM = "--namespace team"
STATE = f"get {TEAM} rayjob {NAME} --ignore-not-found --output jsonpath={{.metadata.name}} "
STATE += "{.status.jobDeploymentStatus}"
PLACE = f"get {TEAM} rayjob {NAME} --output jsonpath={{.status.rayClusterName}} {{.status.jobId}}"
HEAD = f"get {TEAM} pods --selector=ray.io/cluster=c1,ray.io/node-type=head --output name"
EXEC = f"exec {TEAM} pod/head-0 -- ray job"
APPLY = f"apply {TEAM} --filename -"
DELETE = f"delete {TEAM} rayjob {NAME} --wait=true"


@pytest.fixture
def kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClient:
    return FakeClient("kubectl", tmp_path, monkeypatch)


def test_a_job_that_is_not_there_is_created(kubectl: FakeClient) -> None:
    assert KubeRay("team").submit(example(target="kuberay")) == NAME
    assert kubectl.calls == [STATE, APPLY]


@pytest.mark.parametrize("state", ["Complete", "Failed"])
def test_a_job_that_ended_makes_room_for_its_next_attempt(kubectl: FakeClient, state: str) -> None:
    """Applied again as it is, it would stay what it is: ended."""
    kubectl.answer(("jobDeploymentStatus", f"{NAME} {state}", 0))
    KubeRay("team").submit(example(target="kuberay"))
    assert kubectl.calls == [STATE, DELETE, APPLY]


@pytest.mark.parametrize("state", ["", "Initializing", "Running", "Suspended", "Retrying", "Waiting"])
def test_a_job_that_is_under_way_is_left_alone(kubectl: FakeClient, state: str) -> None:
    kubectl.answer(("jobDeploymentStatus", f"{NAME} {state}", 0))
    with pytest.raises(ClusterError, match=rf"{NAME} is running \({state or 'New'}\) in namespace team: follow"):
        KubeRay("team").submit(example(target="kuberay"))
    assert kubectl.calls == [STATE]


def test_jobs_are_listed_with_both_states(kubectl: FakeClient) -> None:
    kubectl.answer(("get rayjobs.ray.io", "pilaf-a   RUNNING   Running\\npilaf-b   <none>   Suspended\\n", 0))
    jobs = [(job.job_id, job.state) for job in KubeRay("team").jobs()]
    assert jobs == [("pilaf-a", "RUNNING Running"), ("pilaf-b", "<none> Suspended")]


RUNNING = (
    ("jobDeploymentStatus", f"{NAME} Running", 0),
    ("rayClusterName", "c1 j1", 0),
    ("get pods", "pod/head-0\\n", 0),
)


def test_logs_are_read_in_the_head(kubectl: FakeClient) -> None:
    kubectl.answer(*RUNNING, ("exec", "one\\ntwo\\n", 0))
    lines: list[str] = []
    KubeRay("team").logs(NAME, follow=True, write=lines.append)
    assert lines == ["one", "two"]
    assert kubectl.calls == [STATE, PLACE, HEAD, f"{EXEC} logs --follow j1"]
    kubectl.answer(*RUNNING, ("exec", "one\\n", 1))
    with pytest.raises(ClusterError, match="kubectl exec ended with exit code 1: the job failed"):
        KubeRay("team").logs(NAME, follow=True, write=lines.append)


def test_logs_of_nothing_are_one_line(kubectl: FakeClient) -> None:
    with pytest.raises(ClusterError, match=f"there is no job '{NAME}' in namespace team"):
        KubeRay("team").logs(NAME, follow=False, write=print)
    kubectl.answer(RUNNING[0], RUNNING[1])
    with pytest.raises(ClusterError, match="has no cluster"):
        KubeRay("team").logs(NAME, follow=False, write=print)


def test_a_stopped_job_saves_before_its_pods_go(kubectl: FakeClient) -> None:
    kubectl.answer(*RUNNING)
    KubeRay("team").stop(NAME)
    assert kubectl.calls == [STATE, PLACE, HEAD, f"{EXEC} stop j1", DELETE]


@pytest.mark.parametrize("state", ["Complete", "Suspended", "Initializing", "Retrying"])
def test_a_job_without_a_driver_is_removed_at_once(kubectl: FakeClient, state: str) -> None:
    kubectl.answer(("jobDeploymentStatus", f"{NAME} {state}", 0))
    KubeRay("team").stop(NAME)
    assert kubectl.calls == [STATE, DELETE]


def test_a_driver_that_cannot_be_told_keeps_its_pods(kubectl: FakeClient) -> None:
    kubectl.answer(*RUNNING, ("exec", "no route", 1))
    with pytest.raises(ClusterError, match=rf"refused: no route; {NAME} is still there: try again, or give up"):
        KubeRay("team").stop(NAME)
    assert DELETE not in kubectl.calls


def node(name: str, *, cpu: str, memory: str, gpus: str | None = None, ready: str = "True", **spec: bool) -> Any:
    """As ``kubectl get nodes --output json`` has it."""
    allocatable = {"cpu": cpu, "memory": memory, **({"nvidia.com/gpu": gpus} if gpus else {})}
    status = {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]}
    return {"metadata": {"name": name}, "spec": spec, "status": status}


def test_pods_without_room_are_warned_of(kubectl: FakeClient) -> None:
    """The example asks for one pod of 8 GPUs, 96 CPUs and 900 GiB beside its head."""
    job = example(target="kuberay")
    small = node("small", cpu="3920m", memory="16000000Ki")
    large = node("large", cpu="96", memory="1000Gi", gpus="8")

    def warned(*nodes: Any) -> tuple[str, ...]:
        kubectl.answer(("get nodes --output json", json.dumps({"items": nodes}), 0))
        return room_warnings(job)

    assert warned(small, large) == ()
    assert kubectl.calls == ["get nodes --output json"]
    (line,) = warned(small, node("half", cpu="95500m", memory="1000Gi", gpus="4"))
    assert line == (
        "as Kubernetes' nodes are now, pods would wait: pod nodes-0-0 needs 8 GPUs, 96 CPUs, 900 GiB on one node; "
        "the largest node has 4 GPUs, 95.5 CPUs, 1000 GiB free: lower resources.nodes[0], or use larger nodes"
    )
    (line,) = warned(large)
    assert "pod head-0 needs 2 CPUs, 8 GiB; beside the other roles the nodes have left: large 0 CPUs" in line
    closed = node("closed", cpu="96", memory="1000Gi", gpus="8", unschedulable=True)
    away = node("away", cpu="96", memory="1000Gi", gpus="8", ready="Unknown")
    assert len(warned(small, closed)) == len(warned(small, away)) == 1
    (line, _) = warned()
    assert line.endswith("the cluster has no nodes")
    _, manifest = yaml.safe_load_all(render(job, "kuberay")["rayjob.yaml"])
    (head,) = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["resources"]["requests"] == {"cpu": f"{HEAD_CPUS:g}", "memory": f"{HEAD_GIB:g}Gi"}


def test_who_may_not_list_nodes_hears_nothing(kubectl: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl.answer(("get nodes", "forbidden: cannot list resource nodes at the cluster scope", 1))
    assert room_warnings(example(target="kuberay")) == ()
    kubectl.answer(("get nodes", "no json", 0))
    assert room_warnings(example(target="kuberay")) == ()
    monkeypatch.setenv("PATH", "/nowhere")
    assert room_warnings(example(target="kuberay")) == ()


def test_pods_wait_longer_than_a_driver_has_to_save() -> None:
    _, manifest = yaml.safe_load_all(render(example(target="kuberay"), "kuberay")["rayjob.yaml"])
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (seconds,) = (v["value"] for v in pod["containers"][0]["env"] if v["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
        assert pod["terminationGracePeriodSeconds"] > int(seconds) == 120
