"""How a learner may be spread over ranks and memory: what is refused, and what DeepSpeed and the planner are told."""

from pathlib import Path

import pytest
import torch

from pilaf_ray.build import build_inputs
from pilaf_ray.config.loader import load_config
from pilaf_ray.data.collate import collate
from pilaf_ray.data.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_qwen2
from pilaf_ray.engines.scoring import ScoringModel, load_network
from pilaf_ray.engines.sequence_checks import check_sequence_parallel
from pilaf_ray.engines.zero_options import NO_OFFLOAD, OffloadSettings, check_disk, zero_section
from pilaf_ray.errors import ConfigError, ModelError
from pilaf_ray.memory import GIB, LearnerSettings, ModelShape, learner_memory

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
PPO = ["algorithm={type: ppo}", "reward_model={}", "learner.ranks=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.sequence_parallel=2"], "learner.sequence_parallel = 2 does not divide learner.ranks = 1"),
        (["learner.ranks=3", "learner.sequence_parallel=2"], "set learner.ranks to a multiple, e.g. 4, or lower"),
        ([*PPO, "learner.sequence_parallel=2"], "the value model of algorithm.type: ppo has no part in it: set"),
        (
            ["learner.ranks=4", "learner.hybrid_ranks=2"],
            "learner.hybrid_ranks needs weights that are parted among ranks",
        ),
        (
            ["learner.ranks=2", "learner.zero_stage=3", "learner.hybrid_ranks=4"],
            "learner.hybrid_ranks = 4 does not divide",
        ),
        (["learner.offload={optimizer: cpu}", "learner.zero_stage=0"], "set learner.zero_stage: 1, 2 or 3"),
        (["learner.offload={parameters: cpu}"], "set learner.zero_stage: 3, or leave learner.offload.parameters out"),
        (["learner.offload={optimizer: nvme}"], "set learner.offload.nvme_path"),
        (
            ["learner.offload={optimizer: nvme, nvme_path: /tmp}"],
            "learner.offload.optimizer: nvme is for ZeRO-3 only: set learner.zero_stage: 3, or",
        ),
        (["learner.offload={optimizer: disk}"], "learner.offload.optimizer: Input should be 'cpu' or 'nvme'"),
        (
            ["model.lora={rank: 4, alpha: 8, quantise: nf4}", "learner.zero_stage=3"],
            "model.lora.quantise packs weights into bytes, which ZeRO-3 cannot part: set learner.zero_stage: 2",
        ),
        (["model.lora={rank: 4, alpha: 8, quantise: int3}"], "model.lora.quantise: Input should be 'nf4'"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_go_together_load() -> None:
    parted = ["learner.ranks=4", "learner.sequence_parallel=2"]
    load_config(TINY, [*parted, "algorithm={type: rloo}", "reward_model={}"])
    load_config(TINY, [*parted, "learner.zero_stage=3", "learner.hybrid_ranks=2"])


def test_models_that_cannot_be_parted_are_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    llama = make_tiny_llama(tmp_path / "llama", seed=0)
    check_sequence_parallel(str(llama), ranks=2)
    check_sequence_parallel(str(make_tiny_gpt2(tmp_path / "gpt2", seed=0)), ranks=2)
    with pytest.raises(ModelError, match=r"= 3 does not divide the 2 heads \(1 of keys and values\).*one of 1, 2$"):
        check_sequence_parallel(str(llama), ranks=3)
    words = [f"model.policy={llama}", "learner.ranks=4", "learner.sequence_parallel=4"]
    with pytest.raises(ModelError, match=r"learner.sequence_parallel = 4 does not divide the 2 heads"):
        build_inputs(load_config(TINY, words))
    windowed = make_tiny_qwen2(tmp_path / "windowed", seed=0)
    config = (windowed / "config.json").read_text()
    assert '"use_sliding_window": false' in config
    (windowed / "config.json").write_text(
        config.replace('"use_sliding_window": false', '"use_sliding_window": true, "max_window_layers": 0').replace(
            '"sliding_window": null', '"sliding_window": 8'
        )
    )
    with pytest.raises(ModelError, match="layers with a sliding window or without attention, which are not parted"):
        check_sequence_parallel(str(windowed), ranks=2)


def test_a_disk_must_be_there_and_be_reachable(tmp_path: Path) -> None:
    check_disk(NO_OFFLOAD, async_io=lambda: False)
    check_disk(OffloadSettings(optimizer="cpu", parameters="cpu"), async_io=lambda: False)
    disk = OffloadSettings(optimizer="nvme", nvme_path=str(tmp_path))
    check_disk(disk, async_io=lambda: True)
    with pytest.raises(ConfigError, match="install libaio-dev, or offload to cpu"):
        check_disk(disk, async_io=lambda: False)
    with pytest.raises(ConfigError, match="there is no folder '/nowhere' on this node"):
        check_disk(OffloadSettings(parameters="nvme", nvme_path="/nowhere"), async_io=lambda: True)
    model = make_tiny_llama(tmp_path / "model", seed=0)
    words = [f"model.policy={model}", "learner.offload={optimizer: nvme, nvme_path: /nowhere}"]
    words.append("learner.zero_stage=3")
    with pytest.raises(ConfigError, match="there is no folder '/nowhere' on this node"):
        build_inputs(load_config(TINY, words))


def test_deepspeed_is_told_where_things_go() -> None:
    assert zero_section(2, offload=NO_OFFLOAD, hybrid_ranks=1, pin_memory=True) == {"stage": 2}
    both = OffloadSettings(optimizer="cpu", parameters="nvme", nvme_path="/disk")
    assert zero_section(3, offload=both, hybrid_ranks=8, pin_memory=True) == {
        "stage": 3,
        "zero_hpz_partition_size": 8,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "nvme", "pin_memory": True, "nvme_path": "/disk"},
    }
    # DeepSpeed's own schema takes it.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    parsed = DeepSpeedZeroConfig(**zero_section(3, offload=both, hybrid_ranks=8, pin_memory=False))
    assert (parsed.offload_optimizer.device, parsed.offload_param.device) == ("cpu", "nvme")
    assert str(parsed.offload_param.nvme_path) == "/disk" and parsed.zero_hpz_partition_size == 8


SHAPE = ModelShape(
    parameters=1_000_000_000,
    layers=16,
    hidden=2048,
    intermediate=8192,
    vocabulary=32_000,
    heads=32,
    kv_heads=8,
    head_size=64,
)


def gib(on_gpu: bool = True, **changes: object) -> dict[str, float]:
    """GiB by part of a rank, parts of the host with a star."""
    settings = {
        "precision": "bfloat16",
        "zero_stage": 3,
        "ranks": 8,
        "micro_batch_tokens": 8192,
        "logprob_chunk_tokens": 128,
        "gradient_checkpointing": False,
        "transport": "nccl",
    }
    estimate = learner_memory(SHAPE, LearnerSettings(**settings | {"on_gpu": on_gpu} | changes))  # type: ignore[arg-type]
    host = {f"{name}*": size / GIB for name, size in estimate.host}
    return {name: size / GIB for name, size in estimate.device} | host


def test_the_planner_counts_what_is_moved_and_what_is_shared() -> None:
    plain = gib()
    parted = gib(sequence_parallel=4)
    assert parted["activations"] == pytest.approx(plain["activations"] / 4)
    assert {name for name in plain if plain[name] != parted[name]} == {"activations"}
    moved = gib(offload=OffloadSettings(optimizer="cpu", parameters="cpu"))
    for name in ("optimizer", "master weights", "weights"):
        assert moved[f"{name}*"] == plain[name] and name not in moved
    assert gib(offload=OffloadSettings(optimizer="nvme", nvme_path="/d")).keys() & {"optimizer", "optimizer*"} == set()
    assert gib(hybrid_ranks=2)["weights for the backward"] == pytest.approx(2e9 / 2 / GIB)
    whole = gib(zero_stage=2, adapter_parameters=10_000_000)["weights"]
    packed = gib(zero_stage=2, adapter_parameters=10_000_000, quantised=True)["weights"]
    below_head = 1e9 - 2 * 32_000 * 2048
    # Half a byte and a sixteenth instead of two.
    assert whole - packed == pytest.approx((2 - 0.5625) * below_head / GIB)
    on_host = gib(on_gpu=False, offload=OffloadSettings(optimizer="cpu"))
    assert sum(on_host.values()) == pytest.approx(sum(gib(on_gpu=False).values())), "a CPU's memory is the host's"


def test_the_head_is_called_once_however_many_chunks_there_are(tmp_path: Path) -> None:
    """ZeRO-3 gathers weights at each call, on all ranks together."""
    network = load_network(str(make_tiny_llama(tmp_path / "model", seed=0)), dtype=torch.float32)
    calls: list[int] = []
    network.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator]
    batch = collate([((3, 4, 5), (6, 7, 8, 9)), ((10, 11), (12, 13, 14))])
    found = {}
    for chunk in (2, 128):
        network.zero_grad()
        logprobs = ScoringModel(network, chunk_tokens=chunk)(batch)
        logprobs.square().sum().backward()
        found[chunk] = (logprobs.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(calls) == 2
    torch.testing.assert_close(found[2], found[128], atol=1e-4, rtol=1e-5)
