"""Nodes that do not belong in one run, a port that is taken, a head or a place that is gone: one line each."""

import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from listeners import HTTP2_SETTINGS, closed_port, listener, web_server
from ray._private import services
from ray.exceptions import RpcError

from pilaf_ray import training_run
from pilaf_ray.actors import cluster, elastic, placement
from pilaf_ray.config.loader import load_config
from pilaf_ray.console.address import require_free_port
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.errors import ClusterError, ConfigError, RoleLostError, RunFolderError
from pilaf_ray.node_agreement import NodeFacts, read_facts, require_agreement
from pilaf_ray.observability.logs import close_logging
from pilaf_ray.placement import RoleRequest, make_groups
from pilaf_ray.restarts import CHILD
from pilaf_ray.run_folder import open_run_folder

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
HERE = NodeFacts(
    node="a", versions=(("python", "3.11.7"), ("torch", "2.13.0"), ("pilaf_ray", "12ab")), sees_folder=True
)


def test_facts_are_those_of_this_environment(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert not read_facts("n", marker, "word").sees_folder
    marker.write_text("other run")
    assert not read_facts("n", marker, "word").sees_folder
    marker.write_text("word")
    facts = read_facts("n", marker, "word")
    assert facts.sees_folder
    versions = dict(facts.versions)
    import numpy

    assert versions["numpy"] == numpy.__version__
    assert len(versions["pilaf_ray"]) == 12
    require_agreement(facts, [replace(facts, node="m")], folder=tmp_path)


def test_every_node_that_differs_is_named_in_one_line() -> None:
    old = replace(HERE, node="b", versions=(("python", "3.11.7"), ("torch", "2.12.0"), ("pilaf_ray", "77ff")))
    blind = replace(HERE, node="c", sees_folder=False)
    with pytest.raises(ClusterError) as refusal:
        require_agreement(HERE, [HERE, old, blind], folder=Path("/runs/x"))
    assert str(refusal.value) == (
        "node b has torch 2.12.0 (here 2.13.0), pilaf_ray 77ff (here 12ab): install the same on every node, "
        "`pilaf-ray doctor` on each tells what it has; "
        "node c does not see run.folder (/runs/x): roles on several nodes write checkpoints, logs and "
        "weights there, so put it on storage that all of them mount at the same place"
    )


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} cannot be bound \(Address already in use\)"):
            require_free_port("127.0.0.1", port)
        with pytest.raises(ConfigError, match=r"^--host, --port: 127"):
            require_free_port("127.0.0.1", port, settings="--host, --port")
    require_free_port("127.0.0.1", port)


def test_a_port_that_is_left_in_time_is_taken() -> None:
    """As that of a console whose controller was killed a moment ago."""
    holder = socket.create_server(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    leaving = threading.Timer(0.3, holder.close)
    leaving.start()
    with pytest.raises(ConfigError, match="cannot be bound"):
        require_free_port("127.0.0.1", port, patience_seconds=0.05)
    require_free_port("127.0.0.1", port, patience_seconds=30)
    leaving.join()


def test_a_resumed_run_hears_of_a_port_that_is_taken_before_a_role_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = make_tiny_llama(tmp_path / "policy", seed=0)
    monkeypatch.setattr(training_run, "RESUMED_PORT_SECONDS", 0.1)
    monkeypatch.delenv(CHILD, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        words = [f"model.policy={policy}", f"run.folder={tmp_path}", "console.serve=true", f"console.port={port}"]
        config = load_config(TINY, words)
        running = open_run_folder(tmp_path / "tiny", config_json=config.model_dump_json(), resume=False)
        with running, pytest.raises(RunFolderError, match="is in use by a running job"):
            training_run.train(config, resume=True)
        try:
            with pytest.raises(ConfigError, match=rf"^console.host, console.port: 127\.0\.0\.1:{port} cannot be bound"):
                training_run.train(config, resume=True)
        finally:
            close_logging()


def joining(address: str) -> str:
    """What is said where the cluster at ``address`` cannot be joined."""
    with pytest.raises(ClusterError) as refusal, cluster.ray_cluster(address=address, num_cpus=1):
        pass
    line = str(refusal.value)
    assert "\n" not in line
    return line


def test_a_head_that_does_not_answer_is_one_line_at_once() -> None:
    address = closed_port()
    assert joining(address).startswith(f"no Ray head answers at {address} (Connection refused): start it with")


def test_what_listens_and_is_no_head_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would wait for minutes."""
    with listener(b"SSH-2.0-OpenSSH_9.6\r\n") as address:
        assert joining(address).startswith(f"what listens at {address} is no Ray head: its port is 6379 unless it was")
        assert joining(f"ray://{address}").startswith(f"what listens at ray://{address} is no Ray head")
    with web_server({"*": (200, "<html></html>")}) as address:
        assert joining(address).startswith(f"what listens at {address} is no Ray head")
    monkeypatch.setattr(cluster, "_REACH_SECONDS", 0.2)
    with listener(b"") as address:
        assert joining(address).startswith(f"no Ray head answers at {address} (timed out): start it with")


def test_a_server_of_rays_protocol_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's head is a gRPC server of the same C core as Python's."""
    grpc = pytest.importorskip("grpc")
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    joined = []
    monkeypatch.setattr(cluster.ray, "init", lambda **settings: joined.append(settings["address"]))
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    with cluster.ray_cluster(address=f"127.0.0.1:{port}", num_cpus=1):
        assert joined == [f"127.0.0.1:{port}"]
    server.stop(None)


def test_auto_without_a_cluster_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # This machine may have clusters of others, which Ray finds by their processes.
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _folder: None)
    assert joining("auto").startswith("no Ray cluster was started on this machine, and resources.address, or RAY_ADDRE")
    gone = closed_port().replace("127.0.0.1", "127.0.0.2")
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _folder: gone)
    assert f"no Ray head answers at {gone}, which Ray noted for address auto (Connection refused)" in joining("auto")
    other = closed_port()
    monkeypatch.setenv("RAY_ADDRESS", other)
    assert joining("auto").startswith(f"no Ray head answers at {other} (")


def test_a_cluster_of_another_version_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n    Python: 3.9.1\n")

    monkeypatch.setattr(cluster.ray, "init", init)
    with listener(HTTP2_SETTINGS) as address:
        words = "Version mismatch: The cluster was started with: Ray: 2.1.0 Python: 3.9.1"
        assert joining(address) == f"cannot join the Ray cluster at {address}: {words}"


async def test_a_place_that_does_not_come_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's words for a reservation whose node was lost are RESCHEDULING, and CREATED once it is placed again."""
    states: Iterator[str] = iter(["CREATED"])
    monkeypatch.setattr(placement, "placement_group", lambda *_, **__: object())
    monkeypatch.setattr(placement, "PlacementGroupSchedulingStrategy", lambda *_, **__: "there")
    monkeypatch.setattr(placement, "placement_group_table", lambda _: {"state": next(states)})
    reservations = placement.Reservations(make_groups([RoleRequest(role="generator", replicas=1, gpus=1.0, cpus=4.0)]))
    for group in reservations._groups:
        reservations._ask(group)
    await reservations.granted("generator", 0)
    await reservations.granted("oracle", 0)  # nothing was planned for it
    states = iter(["RESCHEDULING", "CREATED"])
    await reservations.granted("generator", 0)
    states = iter(["RESCHEDULING", "RESCHEDULING"])
    reservations._seconds = 0.0
    with pytest.raises(
        RoleLostError, match="generator 0 has no place: the cluster shrank below the plan, and 1 GPU, 4 CPUs on"
    ):
        await reservations.granted("generator", 0)


async def test_a_ray_that_does_not_answer_is_one_line_and_nothing_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def unavailable(*_: object, **__: object) -> None:
        asked.append("again")
        raise RpcError("failed to connect to GCS")

    monkeypatch.setattr(placement, "placement_group", lambda *_, **__: object())
    monkeypatch.setattr(placement, "PlacementGroupSchedulingStrategy", lambda *_, **__: "there")
    reservations = placement.Reservations(make_groups([RoleRequest(role="generator", replicas=1, gpus=1.0, cpus=4.0)]))
    for group in reservations._groups:
        reservations._ask(group)
    line = r"Ray does not answer \(RpcError: failed to connect to GCS\)$"
    with monkeypatch.context() as patch:
        patch.setattr(placement, "placement_group_table", unavailable)
        with pytest.raises(ClusterError, match=f"^the place of generator 0: {line}"):
            await reservations.granted("generator", 0)
        patch.setattr(placement, "placement_group", unavailable)
        with pytest.raises(ClusterError, match=f"^a place for generator 3: {line}"):
            await reservations.join("generator", 3)
        patch.setattr(elastic, "draining_nodes", unavailable)
        with pytest.raises(ClusterError, match=f"^where generators could be: {line}"):
            await elastic.view_cluster(None, reservations)  # type: ignore[arg-type]
        reservations._joined["generator", 3] = reservations._places["generator", 3] = "reserved"
        patch.setattr(placement, "remove_placement_group", unavailable)
        with pytest.raises(ClusterError, match=f"^giving back the place of generator 3: {line}"):
            reservations.leave("generator", 3)
    assert len(asked) == 4
    given_back = list[object]()
    monkeypatch.setattr(placement, "remove_placement_group", given_back.append)
    reservations.leave("generator", 3)
    assert given_back == ["reserved"] and ("generator", 3) not in reservations._places


class FakeRay:
    """Reservations that are granted on the node that comes next; what was asked of it is written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
        self.nodes, self.selectors, self.given_back = iter(nodes), list[Any](), list[object]()
        monkeypatch.setattr(placement, "placement_group", self.ask)
        monkeypatch.setattr(placement, "PlacementGroupSchedulingStrategy", lambda *_, **__: "there")
        monkeypatch.setattr(placement, "remove_placement_group", self.given_back.append)
        monkeypatch.setattr(placement, "placement_group_table", lambda reserved: reserved.table)

    def ask(self, bundles: list[Any], *, bundle_label_selector: Any, **_: object) -> Any:
        self.selectors.append(bundle_label_selector)
        return Granted({"state": "CREATED", "bundles_to_node_id": {n: next(self.nodes) for n in range(len(bundles))}})


class Granted:
    def __init__(self, table: dict[str, Any]) -> None:
        self.table = table

    async def ready(self) -> None: ...


async def only_fit(nodes: Sequence[str]) -> None:
    (node,) = nodes
    if not node.startswith("fit"):
        raise ClusterError(f"node {node} has torch 2.12.0 (here 2.13.0)")


GENERATOR = RoleRequest(role="generator", replicas=1, gpus=1.0, labels=(("pool", "a"),))
REFUSAL = r"node old has torch 2\.12\.0 \(here 2\.13\.0\); it is left out until Ray is started anew on it"


async def test_a_newcomers_node_that_is_not_fit_is_refused_and_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, "first", "old", "fit-2")
    reservations = placement.Reservations(make_groups([GENERATOR]), check=only_fit)
    await reservations.acquire(seconds=1)
    reservations.accept()
    await reservations.granted("generator", 0)
    with pytest.raises(ClusterError, match=f"^{REFUSAL}$"):
        await reservations.join("generator", 1)
    assert len(fake.given_back) == 1 and reservations.options("generator", 1) == {}
    assert reservations.unfit == {"old"}
    assert await reservations.join("generator", 1)
    assert fake.selectors[-1] == [{"pool": "a", "ray.io/node-id": "!in(old)"}]


async def test_a_place_that_came_to_a_node_that_is_not_fit_is_asked_for_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = RoleRequest(role="learner", replicas=2, gpus=1.0, gang=True)
    fake = FakeRay(monkeypatch, "one", "two", "fit-3", "fit-4")
    reservations = placement.Reservations(make_groups([ranks]), check=only_fit)
    await reservations.acquire(seconds=1)
    reservations.accept()
    moved = reservations._places["learner", 0]
    moved.table["bundles_to_node_id"][1] = "old"
    with pytest.raises(RoleLostError, match=f"^learner 0 came to a node where it cannot be: {REFUSAL}$"):
        await reservations.granted("learner", 0)
    assert fake.given_back == [moved]
    assert fake.selectors == [None, [{"ray.io/node-id": "!in(old)"}] * 2]
    await reservations.granted("learner", 0)
    reservations.release()
    assert len(fake.given_back) == 2


async def test_a_place_that_others_share_is_refused_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving it back would end the roles that live there."""
    shared = [RoleRequest(role=role, replicas=1, gpus=1.0, colocate="a") for role in ("generator", "reference")]
    fake = FakeRay(monkeypatch, "fit-1")
    reservations = placement.Reservations(make_groups(shared), check=only_fit)
    await reservations.acquire(seconds=1)
    reservations.accept()
    reservations._places["generator", 0].table["bundles_to_node_id"][0] = "old"
    for _ in range(2):
        with pytest.raises(RoleLostError, match=REFUSAL):
            await reservations.granted("generator", 0)
    assert fake.given_back == []
