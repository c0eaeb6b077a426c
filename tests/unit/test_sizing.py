"""Sizing tables: the numbers by hand, and the documents hold what the command prints."""

import re
import sys
from pathlib import Path

import pytest

from pilaf_ray import cli
from pilaf_ray.build import oracle_arguments
from pilaf_ray.config.loader import load_config
from pilaf_ray.engines import device
from pilaf_ray.errors import ConfigError, PlacementError
from pilaf_ray.memory import MemoryEstimate
from pilaf_ray.resource_plan import cache_shortage, memory_shortfalls, plan_on, planned_nodes, role_memory
from pilaf_ray.role_formats import role_formats
from pilaf_ray.sizing import sizing

ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are named from there."""
    monkeypatch.chdir(ROOT)


def printed(name: str, *overrides: str) -> str:
    return sizing(load_config(ROOT / "configs" / f"sizing-{name}.yaml", list(overrides)), rank=16)


@pytest.mark.parametrize("name", ["7b", "70b"])
def test_the_documents_hold_what_the_command_prints(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"pilaf-ray sizing configs/sizing-{name}.yaml"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    page = (ROOT / "docs" / "operations.md").read_text()
    (shown,) = re.findall(rf"<!-- {re.escape(command)} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert capsys.readouterr().out == shown
    assert "would take" not in shown, "what the documents show fits"


def test_numbers_of_7b_are_those_by_hand() -> None:
    """bf16 weights and gradients, fp32 reduced gradients, masters and two moments, all over four ranks."""
    layer = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    n = 32 * (layer + 2 * 4096) + 2 * 32768 * 4096 + 4096
    adapters = 32 * 16 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + 3 * (4096 + 14336))
    config = load_config(ROOT / "configs" / "sizing-7b.yaml")
    learner = {e.role: dict(e.device) for e in role_memory(config)}["learner"]
    states = ("weights", "gradients", "reduced gradients", "master weights", "optimizer")
    assert sum(learner[part] for part in states) == pytest.approx(n / 4 * (2 + 2 + 4 + 4 + 8))
    lora = load_config(ROOT / "configs" / "sizing-7b.yaml", ["model.lora={rank: 16, alpha: 32}"])
    adapted = {e.role: dict(e.device) for e in role_memory(lora)}["learner"]
    assert sum(adapted[part] for part in states) == pytest.approx((n * 2 + adapters * (2 + 2 + 4 + 4 + 8)) / 4)
    text = printed("7b")
    assert f"{2 * n / GIB:.1f} GiB to each generator, with adapters of rank 16 {2 * adapters / GIB:.2f} GiB" in text
    assert f"1/{n / adapters:.0f}." in text


def test_what_does_not_fit_is_said() -> None:
    nodes = "resources.nodes=[{count: 1, gpus: 8, cpus: 96, memory_gib: 900, gpu_memory_gib: 40}]"
    text = printed("7b", nodes)
    assert "with every weight: generator would take 72 GiB of a GPU that has 40: raise generation.tensor" in text
    assert "with adapters: generator would take" in text
    with pytest.raises(PlacementError, match="needs 1 GPU"):
        printed("7b", "learner.ranks=6")
    with pytest.raises(ConfigError, match=r"resources\.nodes: describe the cluster"):
        printed("7b", "resources.nodes=[]")


@pytest.mark.parametrize("pool", ["large", "small"])
def test_a_role_is_measured_by_the_gpus_of_the_node_that_it_is_placed_on(pool: str) -> None:
    """Of two kinds of nodes the larger one has room for a generator, which helps it only where it lies there."""
    kinds = {"large": "gpus: 8, gpu_memory_gib: 80", "small": "gpus: 2, gpu_memory_gib: 40"}
    nodes = ", ".join(f"{{{kind}, cpus: 96, memory_gib: 900, labels: {{pool: {n}}}}}" for n, kind in kinds.items())
    words = [f"resources.{role}.node_labels={{pool: large}}" for role in ("learner", "reference", "oracle")]
    words += [f"resources.nodes=[{nodes}]", f"resources.generator.node_labels={{pool: {pool}}}"]
    config = load_config(ROOT / "configs" / "sizing-7b.yaml", words)
    plan = plan_on(config, planned_nodes(config))
    plan.require()
    found = memory_shortfalls(config, role_memory(config), plan)
    assert len(found) == (pool == "small"), found
    if found:
        assert found[0].startswith("generator would take 72 GiB of a GPU that has 40: raise generation.tensor_parallel")


def test_whole_weights_in_host_memory_are_counted_once_a_group() -> None:
    estimate = MemoryEstimate(
        role="learner", device=(), host=(("loading", 4.0), ("checkpoint", 2.0)), first_only=("checkpoint",)
    )
    assert [estimate.host_bytes_of(replica) for replica in (0, 1)] == [6.0, 4.0]
    room = 4 * 27.0 + 3 * 13.5  # loading on four ranks, and on the first what is sent, saved and, by gloo, packed
    for memory_gib, fits in ((room + 20, True), (room - 20, False)):
        config = load_config(
            ROOT / "configs" / "sizing-7b.yaml",
            [
                f"resources.nodes=[{{count: 1, gpus: 8, cpus: 96, memory_gib: {memory_gib}, gpu_memory_gib: 80}}]",
                "weights.transport=gloo",
            ],
        )
        found = memory_shortfalls(config, role_memory(config), plan_on(config, planned_nodes(config)))
        assert (found == ()) is fits, found


def test_a_cache_that_is_small_for_its_sequences_is_said() -> None:
    """32 layers with 8 heads of 128 for keys and values are 256 KiB a token, in bfloat16, of two networks."""
    sequence = 1536 * 256 / 1024**2
    for kv_cache_gib, fits in ((64 * sequence + 0.01, True), (64 * sequence - 0.01, False)):
        config = load_config(ROOT / "configs" / "sizing-7b.yaml", [f"generation.kv_cache_gib={kv_cache_gib}"])
        found = cache_shortage(config)
        assert (found is None) is fits
    assert found is not None and "holds 63 sequences" in found and "raise it to 24.0 or more" in found
    # Two workers have half of the heads each.
    halved = [f"generation.kv_cache_gib={32 * sequence + 0.01}", "generation.tensor_parallel_size=2"]
    halved += ["resources.generator.gpus=2"]
    assert cache_shortage(load_config(ROOT / "configs" / "sizing-7b.yaml", halved)) is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("sizing-*.yaml")), ids=lambda p: p.stem)
def test_the_sizing_examples_have_room_for_their_sequences(path: Path) -> None:
    assert cache_shortage(load_config(path)) is None


AUTO = ("model.dtype=auto", "learner.precision=auto", "oracle.dtype=auto", "reward_model={precision: auto}")


def test_formats_are_those_of_the_role_and_not_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head or a laptop without GPUs plans the same as one of the nodes."""
    monkeypatch.setattr(device, "cpu_flags", lambda: frozenset({"avx2"}))
    config = load_config(ROOT / "configs" / "sizing-7b.yaml", [*AUTO, "resources.reward.gpus=0.5"])
    formats = role_formats(config)
    assert {formats.generator, formats.reference, formats.learner, formats.reward} == {"bfloat16"}
    assert oracle_arguments(config.scoring_oracle, gpus=config.resources.oracle.gpus)["dtype"] == "bfloat16"
    estimated = {e.role: e.device_bytes for e in role_memory(config)}
    explicit = [word.replace("auto", "bfloat16") for word in AUTO]
    again = role_memory(load_config(ROOT / "configs" / "sizing-7b.yaml", [*explicit, "resources.reward.gpus=0.5"]))
    assert estimated == {e.role: e.device_bytes for e in again}

    on_cpus = [*AUTO, "weights.transport=gloo", "oracle.device=auto"]
    on_cpus += [f"resources.{role}.gpus=0" for role in ("generator", "learner", "reference", "oracle", "reward")]
    config = load_config(ROOT / "configs" / "sizing-7b.yaml", on_cpus)
    formats = role_formats(config)
    assert {formats.generator, formats.reference, formats.learner, formats.reward} == {"float32"}
    assert oracle_arguments(config.scoring_oracle, gpus=0)["dtype"] == "float32"


@pytest.mark.parametrize(
    ("setting", "on_gpu", "flags", "expected"),
    [
        ("auto", True, (), "bfloat16"),
        ("auto", False, (), "float32"),
        ("auto", False, ("avx512_bf16",), "bfloat16"),
        ("auto", False, ("amx_bf16",), "bfloat16"),
        ("float32", True, ("amx_bf16",), "float32"),
        ("bfloat16", False, (), "bfloat16"),
        ("float16", True, (), "float16"),
        ("float16", False, ("amx_bf16",), "float16"),
    ],
)
def test_auto_is_what_the_hardware_multiplies(
    setting: str, on_gpu: bool, flags: tuple[str, ...], expected: str
) -> None:
    assert device.resolve_dtype(setting, on_gpu=on_gpu, flags=frozenset(flags)) == expected


def test_auto_is_float16_on_gpus_that_have_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the V100 and the T4; what this machine's CPU can do does not matter."""
    monkeypatch.setattr(device, "gpus_have_bfloat16", lambda: False)
    for flags in ((), ("amx_bf16",)):
        assert device.resolve_dtype("auto", on_gpu=True, flags=frozenset(flags)) == "float16"
        assert device.resolve_dtype("auto", on_gpu=False, flags=frozenset(flags)) != "float16"
    config = load_config(ROOT / "configs" / "sizing-7b.yaml", [*AUTO, "resources.reward.gpus=0.5"])
    formats = role_formats(config)
    assert {formats.generator, formats.reference, formats.learner, formats.reward} == {"float16"}
    assert oracle_arguments(config.scoring_oracle, gpus=config.resources.oracle.gpus)["dtype"] == "float16"
    estimated = {e.role: (e.device, e.host) for e in role_memory(config)}
    monkeypatch.setattr(device, "gpus_have_bfloat16", lambda: True)
    assert {e.role: (e.device, e.host) for e in role_memory(config)} == estimated, "it takes the room of bfloat16"


def test_roles_that_take_turns_need_the_room_of_the_larger_one() -> None:
    """On one GPU for each pair of a generator and a rank; what rests is on the host."""
    shared = "resources={generator: {gpus: 1, colocate: g}, learner: {gpus: 1, colocate: g}, reference: {gpus: 1}"
    shared += ", oracle: {gpus: 1}, nodes: [{count: 1, gpus: 8, cpus: 96, memory_gib: 900, gpu_memory_gib: 80}]"
    path, settings = (
        ROOT / "configs" / "sizing-7b.yaml",
        ["learner.ranks=4", "generation.replicas=4", "weights.transport=gloo"],
    )
    beside, in_turns = (load_config(path, [*settings, f"{shared}, turns: {turns}}}"]) for turns in ("false", "true"))
    plan = plan_on(beside, planned_nodes(beside))
    (too_much,) = memory_shortfalls(beside, role_memory(beside), plan)
    assert "generator and learner would take 110 GiB of a GPU that has 80" in too_much
    assert too_much.endswith("or let generator and learner take turns (resources.turns)")
    assert memory_shortfalls(in_turns, role_memory(in_turns), plan) == ()
    for before, after in zip(role_memory(beside), role_memory(in_turns), strict=True):
        states = dict(after.host).get("at rest", 0.0)
        assert after.device == before.device and after.host_bytes == before.host_bytes + states
        # Two halves in bfloat16; of a rank, weights in bfloat16 and a quarter of the rest (ZeRO-2 or 3).
        assert (states > 12 * 2**30) is (after.role in ("generator", "learner")), (after.role, states / 2**30)
