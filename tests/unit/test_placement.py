"""The planner: what it promises for any cluster, and what it says when something does not fit."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilaf_ray import resource_plan
from pilaf_ray.config.loader import load_config
from pilaf_ray.errors import ConfigError, PlacementError
from pilaf_ray.placement import BundleGroup, NodeCapacity, RoleRequest, make_groups, plan_placement

ROOT = Path(__file__).parents[2]
EIGHT = NodeCapacity(name="a", cpus=64, gpus=8, memory_gib=512)


def request(role: str, replicas: int = 1, **values: object) -> RoleRequest:
    settings = {"setting": f"resources.{role}", "count_setting": f"{role}.replicas"}
    return RoleRequest(role=role, replicas=replicas, **{**settings, **values})  # type: ignore[arg-type]


amounts = st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
requests = st.lists(
    st.builds(
        RoleRequest,
        role=st.sampled_from(["generator", "learner", "reference", "oracle"]),
        replicas=st.integers(1, 6),
        cpus=amounts,
        gpus=amounts,
        memory_gib=st.sampled_from([0.0, 16.0, 64.0]),
        labels=st.sampled_from([(), (("zone", "a"),)]),
        gang=st.booleans(),
        strategy=st.sampled_from(["pack", "strict_pack", "spread", "strict_spread"]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda r: r.role,
)
clusters = st.lists(
    st.builds(
        NodeCapacity,
        name=st.uuids().map(str),
        cpus=st.sampled_from([4.0, 16.0, 64.0]),
        gpus=st.sampled_from([0.0, 4.0, 8.0]),
        memory_gib=st.sampled_from([64.0, 512.0]),
        labels=st.sampled_from([(), (("zone", "a"),), (("zone", "b"),)]),
    ),
    max_size=6,
    unique_by=lambda node: node.name,
)


@given(requests, clusters)
def test_no_node_is_given_more_than_it_has_and_labels_and_strategies_are_kept(
    wanted: list[RoleRequest], nodes: list[NodeCapacity]
) -> None:
    plan = plan_placement(make_groups(wanted), nodes)
    by_name = {node.name: node for node in nodes}
    used: dict[str, Counter[str]] = {}
    for group in plan.groups:
        chosen = plan.assigned.get(group.name, ())
        for name, bundle in zip(chosen, group.bundles, strict=False):
            total = used.setdefault(name, Counter())
            total.update({"cpus": bundle.cpus, "gpus": bundle.gpus, "memory": bundle.memory_gib})  # type: ignore[dict-item]
            assert set(bundle.labels) <= set(by_name[name].labels)
        assert not chosen or len(chosen) == len(group.bundles)
        if group.strategy == "strict_pack":
            assert len(set(chosen)) <= 1
        if group.strategy == "strict_spread":
            assert len(set(chosen)) == len(chosen)
    for name, total in used.items():
        assert total["cpus"] <= by_name[name].cpus + 1e-6
        assert total["gpus"] <= by_name[name].gpus + 1e-6
        assert total["memory"] <= by_name[name].memory_gib + 1e-6


@given(requests, clusters)
def test_every_group_is_placed_or_a_shortfall_is_said(wanted: list[RoleRequest], nodes: list[NodeCapacity]) -> None:
    plan = plan_placement(make_groups(wanted), nodes)
    missing = [group.name for group in plan.groups if group.name not in plan.assigned]
    assert bool(missing) == bool(plan.shortfalls)
    assert all("\n" not in line for line in plan.shortfalls)


@given(requests, clusters)
def test_every_replica_is_in_one_bundle(wanted: list[RoleRequest], nodes: list[NodeCapacity]) -> None:
    members = [m for group in make_groups(wanted) for bundle in group.bundles for m in bundle.members]
    assert Counter((m.role, m.replica) for m in members) == Counter(
        (r.role, i) for r in wanted for i in range(r.replicas)
    )


@given(st.integers(1, 8), st.integers(1, 8))
def test_whole_devices_fit_if_and_only_if_there_are_enough(replicas: int, devices: int) -> None:
    # Bundles of one GPU leave no holes, so the packing must be exact here.
    plan = plan_placement(make_groups([request("generator", replicas, gpus=1.0)]), [replace(EIGHT, gpus=devices)])
    assert bool(plan.shortfalls) == (replicas > devices)


def test_too_small_nodes_are_named_with_the_settings_that_mend_it() -> None:
    nodes = [replace(EIGHT, name=n, gpus=4) for n in "ab"]
    learner = request("learner", 8, gpus=1.0, cpus=1.0, gang=True, strategy="strict_pack")
    with pytest.raises(PlacementError) as caught:
        plan_placement(make_groups([learner]), nodes).require()
    assert str(caught.value) == (
        "learner needs 8 GPUs, 8 CPUs on one node; the largest node has 4 GPUs, 64 CPUs free: lower "
        "learner.replicas or resources.learner, or set resources.learner.strategy: pack, or use larger nodes"
    )
    plan_placement(make_groups([replace(learner, strategy="pack")]), nodes).require()


def test_full_nodes_labels_and_empty_clusters_are_told_apart() -> None:
    two = make_groups([request("generator", 2, gpus=8.0)])
    assert "beside the other roles the nodes have left: a 0 GPUs, 64 CPUs" in plan_placement(two, [EIGHT]).shortfalls[0]
    labelled = make_groups([request("oracle", labels=(("zone", "b"),))])
    assert "oracle-0 wants nodes labelled zone=b; no node is" in plan_placement(labelled, [EIGHT]).shortfalls[0]
    assert "the cluster has no nodes" in plan_placement(two, []).shortfalls[0]


def test_tensor_parallel_replicas_keep_whole_nodes_free_by_going_first() -> None:
    wanted = [request("reference", 4, gpus=1.0), request("generator", 1, gpus=8.0)]
    nodes = [EIGHT, replace(EIGHT, name="b", gpus=4)]
    plan = plan_placement(make_groups(wanted), nodes)
    assert plan.members_by_node() == {"b": [f"reference-{i}" for i in range(4)], "a": ["generator-0"]}


def test_colocated_roles_split_their_device() -> None:
    wanted = [
        request("generator", 2, gpus=1.0, cpus=2.0, colocate="shared"),
        request("learner", 2, gpus=1.0, cpus=1.0, colocate="shared", gang=True),
        request("oracle", 1, cpus=1.0, colocate="shared"),
    ]
    (group,) = make_groups(wanted)
    assert isinstance(group, BundleGroup)
    assert [(b.gpus, b.cpus) for b in group.bundles] == [(1.0, 4.0), (1.0, 3.0)]
    assert [m.gpus for m in group.bundles[0].members] == [0.5, 0.5, 0.0]
    with pytest.raises(ConfigError, match="roles share single GPUs only"):
        make_groups([request("generator", gpus=2.0, colocate="shared")])


@pytest.mark.parametrize("name", ["quickstart", "llama3-8b-hh"])
def test_shipped_configurations_fit_the_nodes_that_they_describe(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    nodes = resource_plan.planned_nodes(config) or (NodeCapacity(name="here", cpus=2.0),)
    plan_placement(make_groups(resource_plan.role_requests(config)), nodes).require()


@pytest.mark.parametrize(
    ("setting", "ranks", "per_node", "divided"),
    [
        ("sequence_parallel", 8, 4, None),
        (
            "sequence_parallel",
            6,
            3,
            "1 of 3 groups of ranks that talk in every layer lie on several nodes, ranks 2 to 3 on",
        ),
        ("hybrid_ranks", 4, 1, "2 of 2 groups of ranks that talk in every layer lie on several nodes, ranks 0 to 1 on"),
        ("hybrid_ranks", 4, 2, None),
    ],
)
def test_ranks_that_belong_together_and_lie_apart_are_said(
    setting: str, ranks: int, per_node: int, divided: str | None
) -> None:
    words = [f"learner.{setting}=2", f"learner.ranks={ranks}", "learner.zero_stage=3"]
    config = load_config(ROOT / "configs/llama3-8b-hh.yaml", words)
    learner = request("learner", ranks, gpus=1.0, gang=True)
    nodes = [replace(EIGHT, name=name, gpus=per_node) for name in "abcd"[: ranks // per_node]]
    plan = plan_placement(make_groups([learner]), nodes)
    found = resource_plan.divided_ranks(config, plan)
    assert len(found) == (divided is not None)
    if divided:
        assert found[0].startswith(f"learner.{setting} = 2: {divided} a and b: take a number that divides")


def test_generators_need_a_device_for_each_worker() -> None:
    path = ROOT / "configs/llama3-8b-hh.yaml"
    with pytest.raises(ConfigError, match=r"is less than generation\.tensor_parallel_size = 2"):
        load_config(path, ["generation.tensor_parallel_size=2"])


def test_drafts_are_refused_where_the_engine_has_a_device() -> None:
    with pytest.raises(ConfigError, match=r"generation\.speculation works on CPUs only: leave it out, or"):
        load_config(ROOT / "configs/llama3-8b-hh.yaml", ["generation.speculation={tokens: 4}"])


def test_workers_of_one_engine_have_a_number_of_threads() -> None:
    words = ["generation.cpu_threads=auto", "generation.tensor_parallel_size=2"]
    with pytest.raises(ConfigError, match=r"generation\.cpu_threads: auto is for engines of one worker"):
        load_config(ROOT / "configs/quickstart.yaml", words)
