"""Reservations on a real Ray cluster of three nodes."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from pilaf_ray.actors import node_checks
from pilaf_ray.actors.placement import Reservations, cluster_nodes, node_name, store_place, wait_for_nodes
from pilaf_ray.errors import ClusterError, PlacementError, RoleLostError
from pilaf_ray.node_agreement import NodeFacts, read_facts
from pilaf_ray.node_memory import read_memory
from pilaf_ray.placement import RoleRequest, make_groups, plan_placement

LEARNER = RoleRequest(role="learner", replicas=2, cpus=1.0, gpus=1.0, gang=True, strategy="strict_spread")
# The GPU is a number to Ray: nothing is computed on it here.
GENERATOR = RoleRequest(role="generator", replicas=1, cpus=1.0, labels=(("pool", "cpu"),))


@pytest.fixture(scope="module", autouse=True)
def three_nodes() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "labels": {"pool": "cpu"}})
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@ray.remote(num_cpus=1)
class Where:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


async def test_ranks_lie_where_the_strategy_says_and_labels_are_kept() -> None:
    plan = plan_placement(make_groups([LEARNER, GENERATOR]), cluster_nodes())
    plan.require()
    reservations = Reservations(plan.groups)
    await reservations.acquire(seconds=60)
    ranks = [Where.options(**reservations.options("learner", rank)).remote() for rank in range(2)]
    generator = Where.options(**reservations.options("generator", 0)).remote()
    *learner_nodes, generator_node = ray.get([actor.node.remote() for actor in (*ranks, generator)], timeout=60)
    labelled = [node["NodeID"] for node in ray.nodes() if node["Labels"].get("pool") == "cpu"]
    assert labelled == [generator_node]
    assert len({*learner_nodes, generator_node}) == 3
    # All is taken now: the plan says so before anything waits.
    with pytest.raises(PlacementError, match="learner needs 1 GPU, 1 CPU on one node; the largest node has"):
        plan_placement(make_groups([LEARNER]), cluster_nodes()).require()
    reservations.release()


async def test_what_is_not_granted_in_time_is_named_and_given_back() -> None:
    groups = make_groups([replace(LEARNER, role="first"), replace(LEARNER, replicas=3)])
    with pytest.raises(PlacementError, match="did not reserve 3 x 1 GPU, 1 CPU for learner within 5 s"):
        await Reservations(groups).acquire(seconds=5)
    again = Reservations(make_groups([LEARNER]))
    await again.acquire(seconds=60)
    again.release()


async def test_one_more_replica_reserves_what_the_first_has_and_gives_it_back() -> None:
    request = RoleRequest(role="generator", replicas=1, gpus=1.0)
    reservations = Reservations(make_groups([request]))
    await reservations.acquire(seconds=60)
    assert not await reservations.join("generator", 0), "it has its place already"
    assert await reservations.join("generator", 1)
    actor = Where.options(num_cpus=0, **reservations.options("generator", 1)).remote()
    assert ray.get(actor.node.remote(), timeout=60)
    ray.kill(actor)
    reservations._seconds = 2.0
    with pytest.raises(PlacementError, match="did not reserve 1 x 1 GPU for generator 2 within 2 s"):
        await reservations.join("generator", 2)
    assert reservations.options("generator", 2) == {}
    reservations.leave("generator", 1)
    reservations._seconds = 60.0
    assert await reservations.join("generator", 2), "the place of the one that left"
    reservations.release()
    again = Reservations(make_groups([replace(request, replicas=2)]))
    await again.acquire(seconds=60)
    again.release()


async def test_nodes_of_a_run_must_have_its_packages_and_see_its_folder(
    three_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservations = Reservations(make_groups([LEARNER]))
    await reservations.acquire(seconds=60)
    nodes = reservations.node_ids()
    assert len(set(nodes)) == 2
    await node_checks.require_fit_nodes(nodes, folder=tmp_path, seconds=60)
    assert list(tmp_path.iterdir()) == [], "what was written to look for is gone"

    def elsewhere(node: str, marker: Path, token: str) -> NodeFacts:
        return read_facts(node, marker.with_name("not-there"), token)

    monkeypatch.setattr(node_checks, "read_facts", elsewhere)
    with pytest.raises(ClusterError, match=r"does not see run\.folder \(.*\): roles on several nodes write"):
        await node_checks.require_fit_nodes(nodes, folder=tmp_path, seconds=60)
    reservations.release()
    await _nothing_is_held()

    # The plan's nodes are asked before anything is reserved; those that only Ray chose give everything back.
    plan = plan_placement(make_groups([LEARNER]), cluster_nodes())
    before = len(placement_group_table())
    for asked, reserved in ((plan, 0), (replace(plan, assigned={}), 1)):
        with pytest.raises(ClusterError, match=r"does not see run\.folder"):
            await node_checks.reserve_fit_nodes(asked, folder=tmp_path, seconds=60)
        assert len(placement_group_table()) - before == reserved
        await _nothing_is_held()
    monkeypatch.undo()
    fit = await node_checks.reserve_fit_nodes(plan, folder=tmp_path, seconds=60)
    assert set(fit.node_ids()) == set(nodes)

    # Where Ray put the ranks is what counts, with all the memory that the machine has.
    granted = await node_checks.as_reserved(replace(plan, assigned={}), fit, seconds=60)
    names = {node["NodeID"]: node_name(node) for node in ray.nodes()}
    assert granted.assigned == {"learner": tuple(names[fit.node_of("learner", rank) or ""] for rank in range(2))}
    total = pytest.approx(read_memory().host_gib)
    assert [node.memory_gib == total for node in granted.nodes if node.name in granted.assigned["learner"]] == [
        True
    ] * 2

    # Nodes that are all taken have joined all the same.
    await wait_for_nodes(3, seconds=1)
    with pytest.raises(ClusterError, match=r"3 of the 4 nodes in resources\.nodes joined the cluster within 1 s"):
        await wait_for_nodes(4, seconds=1)
    fit.release()


async def test_a_node_that_is_lost_is_missed_and_only_a_fit_one_takes_its_place(three_nodes: Cluster) -> None:
    unfit = set[str]()

    async def check(nodes: Sequence[str]) -> None:
        if unfit & set(nodes):
            raise ClusterError("node b has torch 2.12.0 (here 2.13.0)")

    first = three_nodes.add_node(num_cpus=1, labels={"pool": "spare"})
    spare = RoleRequest(role="generator", replicas=1, cpus=1.0, labels=(("pool", "spare"),))
    reservations = Reservations(make_groups([spare]), check=check)
    await reservations.acquire(seconds=60)
    reservations.accept()
    assert reservations.node_of("generator", 0) == first.node_id
    three_nodes.remove_node(first, allow_graceful=False)
    async with asyncio.timeout(60):
        while reservations.node_of("generator", 0) is not None:
            await asyncio.sleep(0.1)
    reservations._seconds = 1.0
    shrank = r"generator 0 has no place: the cluster shrank below the plan, and 1 CPU on one node did not come back"
    with pytest.raises(RoleLostError, match=shrank):
        await reservations.granted("generator", 0)

    # Somebody adds a node that is not fit, and then one that is.
    reservations._seconds = 60.0
    second = three_nodes.add_node(num_cpus=1, labels={"pool": "spare"})
    unfit.add(second.node_id)
    with pytest.raises(RoleLostError, match=r"came to a node where it cannot be: node b has torch 2\.12\.0"):
        await reservations.granted("generator", 0)
    assert reservations.unfit == {second.node_id}
    third = three_nodes.add_node(num_cpus=1, labels={"pool": "spare"})
    await reservations.granted("generator", 0)
    assert reservations.node_of("generator", 0) == third.node_id
    reservations._seconds = 1.0
    with pytest.raises(PlacementError, match="did not reserve 1 x 1 CPU for generator 1 within 1 s"):
        await reservations.join("generator", 1)
    reservations.release()
    for node in (second, third):
        three_nodes.remove_node(node)


def test_a_ledger_in_a_file_stays_on_the_drivers_node() -> None:
    place = store_place("sqlite:////shared/runs/a/preferences.db")["scheduling_strategy"]
    where = ray.get([Where.options(num_cpus=0, scheduling_strategy=place).remote().node.remote() for _ in range(6)])
    assert set(where) == {ray.get_runtime_context().get_node_id()}
    assert store_place("postgresql+psycopg://db.example/pilaf") == {}


async def _nothing_is_held() -> None:
    """Return once all GPUs are free: Ray gives back a moment after it is told."""
    async with asyncio.timeout(60):
        while sum(node.gpus for node in cluster_nodes()) < 2:
            await asyncio.sleep(0.1)
