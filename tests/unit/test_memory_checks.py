"""What estimates say of nodes: a refusal where states have no room, a warning where the rest may not."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.errors import PlacementError
from pilaf_ray.memory import GIB, MemoryEstimate
from pilaf_ray.memory_checks import check_memory, memory_warnings
from pilaf_ray.node_memory import group_limits, read_memory
from pilaf_ray.placement import NodeCapacity, PlacementPlan
from pilaf_ray.resource_plan import memory_shortfalls, plan_on, state_shortfalls

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
NODE = NodeCapacity(name="a", cpus=8.0, gpus=8.0, memory_gib=512.0, gpu_memory_gib=80.0)
ESTIMATES = (
    MemoryEstimate(role="generator", device=(("weights", 30 * GIB), ("KV cache", 60 * GIB)), host=(("runtime", GIB),)),
    MemoryEstimate(
        role="learner",
        device=(("weights", 30 * GIB), ("value model's optimizer", 20 * GIB), ("activations", 50 * GIB)),
        host=(("optimizer", 100 * GIB), ("loading", 300 * GIB)),
    ),
    MemoryEstimate(role="reference", device=(), host=(("weights", 40 * GIB),)),
    MemoryEstimate(role="oracle", device=(), host=(("runtime", GIB),)),
)
GPUS = ("resources.generator.gpus=1", "resources.learner.gpus=1")


def planned(*overrides: str, nodes: tuple[NodeCapacity, ...] = (NODE,)) -> tuple[RunConfig, PlacementPlan]:
    config = load_config(TINY, list(overrides))
    return config, plan_on(config, nodes)


@pytest.mark.parametrize(("size", "refused", "warned"), [(80.0, 0, 2), (49.0, 1, 2), (29.0, 2, 2), (0.0, 0, 0)])
def test_states_beyond_a_gpu_are_refused_and_the_rest_is_a_warning(size: float, refused: int, warned: int) -> None:
    config, plan = planned(*GPUS, nodes=(replace(NODE, gpu_memory_gib=size),))
    refusals = state_shortfalls(config, ESTIMATES, plan)
    assert (len(refusals), len(memory_shortfalls(config, ESTIMATES, plan))) == (refused, warned)
    if refused:
        assert (
            f"learner must hold 50.0 GiB of weights and what trains them on a GPU that has {size:.1f}: raise learner."
            in "".join(refusals)
        )


def test_states_on_one_gpu_are_added_up_unless_their_roles_take_turns() -> None:
    shared = (*GPUS, "resources.generator.colocate=a", "resources.learner.colocate=a", "weights.transport=gloo")
    (line,) = state_shortfalls(*_with(ESTIMATES, planned(*shared, nodes=(replace(NODE, gpu_memory_gib=79.0),))))
    assert line.startswith("generator and learner must hold 80.0 GiB") and line.endswith("(resources.turns)")
    in_turns = planned(*shared, "resources.turns=true", nodes=(replace(NODE, gpu_memory_gib=79.0),))
    assert state_shortfalls(*_with(ESTIMATES, in_turns)) == ()


def test_states_beyond_a_nodes_memory_are_refused_where_it_is_certain_who_lies_there() -> None:
    """The reference reserves nothing here: on a cluster of two nodes Ray may put it on either."""
    small = replace(NODE, memory_gib=139.0)
    (line,) = state_shortfalls(*_with(ESTIMATES, planned(*GPUS, nodes=(small,))))
    assert line == (
        "a has 139.0 GiB of memory, and weights and what trains them alone take 140.0: learner-0, reference-0; "
        "spread them over more nodes, take larger ones, or train adapters or a smaller model"
    )
    config, plan = planned(*GPUS, nodes=(small, replace(small, name="b")))
    assert len({*plan.members_by_node()}) >= 1 and state_shortfalls(config, ESTIMATES, plan) == ()


def _with(
    estimates: tuple[MemoryEstimate, ...], planned: tuple[RunConfig, PlacementPlan]
) -> tuple[RunConfig, tuple[MemoryEstimate, ...], PlacementPlan]:
    config, plan = planned
    return config, estimates, plan


def test_a_run_is_refused_warned_of_or_let_go(tmp_path: Path) -> None:
    policy = f"model.policy={make_tiny_llama(tmp_path / 'policy', seed=0)}"
    for memory_gib, warned in ((900.0, 0), (1.0, 1)):
        found = check_memory(*planned(policy, nodes=(replace(NODE, memory_gib=memory_gib),)))
        assert len(found) == warned, found
    with pytest.raises(
        PlacementError, match=r"^a has 0\.0 GiB of memory, and weights and what trains them alone"
    ) as no:
        check_memory(*planned(policy, nodes=(replace(NODE, memory_gib=1e-6),)))
    assert "\n" not in str(no.value)


def test_a_hub_id_is_estimated_from_this_machines_cache_or_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    small = (replace(NODE, memory_gib=1.0),)
    unknown = (
        "owner/policy: there is no config.json of it in this machine's hub cache, so memory cannot be estimated: "
        "`hf download owner/policy config.json` fetches it"
    )
    for look in (check_memory, memory_warnings):
        assert look(*planned("model.policy=owner/policy", nodes=small)) == (unknown,)
        (line,) = look(*planned("model.policy=/not/here", nodes=small))
        assert line == "/not/here: there is no config.json of it on this machine, so memory cannot be estimated"
    repository = tmp_path / "models--owner--policy"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    make_tiny_llama(repository / "snapshots" / "abc", seed=0)
    for look in (check_memory, memory_warnings):
        (line,) = look(*planned("model.policy=owner/policy", nodes=small))
        assert line.startswith("a has 1 GiB of memory, the roles on it would take")


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/job/step\n", {"job/memory.max": "700", "job/step/memory.max": "max"}, [700]),
        # Inside a container the path may be the host's.
        ("0::/elsewhere/7\n", {"memory.max": "500"}, [500]),
        ("3:cpu:/x\n2:memory,hugetlb:/x\n", {"memory/x/memory.limit_in_bytes": "9", "cpu/x/memory.max": "1"}, [9]),
        ("", {}, []),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], limits: list[int]) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n" if name.startswith("sys") else text)
    assert list(group_limits(tmp_path)) == limits


def test_this_machine_has_memory() -> None:
    assert read_memory().host_gib > 0
