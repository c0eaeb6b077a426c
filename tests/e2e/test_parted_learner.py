"""Ways to spread a learner over ranks and memory, each of which trains as one rank does that has everything.

Four ranks: rows in halves make two groups of two, and so do weights that are kept in halves.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_batches import batch
from rank_processes import RankProcesses
from torch import Tensor

from pilaf_ray.data.tiny_models import make_tiny_tokenizer
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.zero_options import OffloadSettings

LORA = LoraSettings(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "gate_proj", "down_proj"))
QLORA = LoraSettings(rank=4, alpha=6.0, dropout=0.0, targets=LORA.targets, quantise="nf4")
ON_HOST = OffloadSettings(optimizer="cpu")
ALL_ON_HOST = OffloadSettings(optimizer="cpu", parameters="cpu")
STEPS = 3


@dataclass(frozen=True)
class Training:
    """What one training showed."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, of the whole batch."""
    weights: dict[str, Tensor]
    """After the last."""
    kept_twice: int
    """Parameters that ranks keep among a few of them for the backward."""
    whole: list[int]
    """Numbers that this rank has of parameters that are whole: at each weight handed out, and with all gathered."""


def train(place: dict[str, Any], model: Path, out: Path, variant: dict[str, Any]) -> Training:
    from deepspeed.utils import safe_get_full_grad

    from pilaf_ray.engines.learner import PolicyLearner

    settings: dict[str, Any] = {
        "model_path": str(model),
        "zero_stage": 0,
        "precision": "float32",
        "loss": "dpo",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "learning_rate": 1e-3,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "total_steps": 10,
        "micro_batch_tokens": 64,
        # Ranks have different numbers of chunks.
        "logprob_chunk_tokens": 4,
        "dump_folder": out,
    }
    rests = variant.get("rests", False)
    learner = PolicyLearner(**place, **settings | {key: value for key, value in variant.items() if key != "rests"})
    engine, take_step = learner._engine, learner._engine.step
    gradients: list[dict[str, Tensor]] = []
    kept_twice: list[int] = []

    def noted() -> Tensor:
        trained = [(name, p) for name, p in engine.network.named_parameters() if p.requires_grad]
        whole = [(name, p.grad if engine._zero_stage == 0 else safe_get_full_grad(p)) for name, p in trained]
        gradients.append({name: gradient.clone() for name, gradient in whole})
        kept_twice.append(sum(getattr(p, "ds_secondary_tensor", None) is not None for _, p in trained))
        return take_step()

    engine.step = noted  # type: ignore[method-assign]
    steps = []
    for number in range(1, STEPS + 1):
        if rests:
            learner.rest()
            require_empty(engine)
            learner.resume()
        steps.append(learner.train_step(number, batch()))
    parameters = list(engine.network.parameters())
    weights, whole = {}, []
    for name, tensor in engine.named_weights():
        whole.append(sum(p.numel() for p in parameters))
        weights[name] = tensor.clone()
    with engine._whole(*parameters):
        whole.append(sum(p.numel() for p in parameters))
    losses, norms = [s.loss for s in steps], [s.metrics["grad_norm"] for s in steps]
    return Training(losses, norms, gradients[0], weights, kept_twice[0], whole)


def require_empty(engine: Any) -> None:
    """No weight, no part of one and no state of the optimiser has memory of its own on the device.

    Without ZeRO, on CPUs, weights lie in the model's files and belong to nobody.
    """
    states = engine._engine.optimizer.state.values()
    tensors = [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
    for parameter in engine.network.parameters():
        tensors += [parameter.data, getattr(parameter, "ds_tensor", parameter.data)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    assert all(storage.nbytes() == 0 or not storage.resizable() for storage in storages)
    assert not any(storage.nbytes() for storage in storages) or engine._zero_stage == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model whose matrices are just large enough for ZeRO-3 to part them again after each use."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("parted")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    make_tiny_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def alone() -> Iterator[RankProcesses]:
    with RankProcesses(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def four() -> Iterator[RankProcesses]:
    with RankProcesses(4) as processes:
        yield processes


@pytest.fixture(scope="module")
def every_weight(alone: RankProcesses, folder: Path) -> Training:
    return alone.run(train, folder / "model", folder, {})[0]


@pytest.fixture(scope="module")
def adapters(alone: RankProcesses, folder: Path) -> Training:
    return alone.run(train, folder / "model", folder, {"lora": LORA})[0]


def gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


def require_same(found: list[Training], expected: Training) -> None:
    """Up to rounding in fp32; gradients are up to 0.2, and Adam's steps up to 0.001 each."""
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, abs=1e-5)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-4)
        assert gap(rank.gradients, expected.gradients) < 2e-6
        assert gap(rank.weights, expected.weights) < 1e-4


# Sizes by hand: the embedding is the head, too; k and v are of one head, of 96 numbers.
LARGE = 512 * 384 + 2 * (2 * 384 * 384 + 3 * 384 * 512)
KEPT = 2 * (2 * 384 * 96) + 5 * 384
"""Below DeepSpeed's threshold of 100,000 numbers ZeRO-3 leaves a parameter whole for good."""
LARGEST = 512 * 384
ADAPTERS = 2 * 4 * ((384 + 384) + (384 + 96) + 2 * (384 + 512))
"""A and B of rank 4 beside q, v, gate and down of two layers: small, too."""


def require_one_whole_at_a_time(found: list[Training], *, kept: int) -> None:
    """While weights are handed out nobody holds more than one that is parted."""
    for rank in found:
        *walking, everything = rank.whole
        assert everything == LARGE + kept
        assert len(walking) == len(rank.weights) == 1 + 2 * 9 + 1
        assert max(walking) <= LARGEST + kept


PARTED: dict[str, dict[str, Any]] = {
    "sequence": {"sequence_parallel": 2},
    "sequence-zero2-rows-apart": {
        "sequence_parallel": 2,
        "zero_stage": 2,
        "share_prompts": False,
        "gradient_checkpointing": True,
    },
    "sequence-zero3": {"sequence_parallel": 2, "zero_stage": 3},
    "optimizer-on-host-zero1": {"zero_stage": 1, "offload": ON_HOST},
    "optimizer-on-host-zero2": {"zero_stage": 2, "offload": ON_HOST},
    "all-on-host-zero3": {"zero_stage": 3, "offload": ALL_ON_HOST},
}
PARTED_ADAPTERS: dict[str, dict[str, Any]] = {
    "sequence": {"sequence_parallel": 2},
    "sequence-zero3": {"sequence_parallel": 2, "zero_stage": 3},
    "all-on-host-zero3": {"zero_stage": 3, "offload": ALL_ON_HOST},
}


@pytest.mark.parametrize("name", PARTED)
def test_training_every_weight(name: str, four: RankProcesses, every_weight: Training, folder: Path) -> None:
    found = four.run(train, folder / "model", folder, PARTED[name])
    require_same(found, every_weight)
    if PARTED[name].get("zero_stage") == 3:
        require_one_whole_at_a_time(found, kept=KEPT)


@pytest.mark.parametrize("name", PARTED_ADAPTERS)
def test_training_adapters(name: str, four: RankProcesses, adapters: Training, folder: Path) -> None:
    variant = {"lora": LORA, **PARTED_ADAPTERS[name]}
    found = four.run(train, folder / "model", folder, variant)
    require_same(found, adapters)
    if variant.get("zero_stage") == 3:
        require_one_whole_at_a_time(found, kept=KEPT + ADAPTERS)


@pytest.mark.parametrize("name", ["model", "base"])
def test_training_adapters_of_four_bits(name: str, four: RankProcesses, alone: RankProcesses, folder: Path) -> None:
    """As adapters of the model that the four bits stand for, which generators and reference have."""
    pytest.importorskip("bitsandbytes")
    from pilaf_ray.engines.quantised import write_base

    write_base(str(folder / "model"), folder / "base")
    expected = alone.run(train, folder / "base", folder, {"lora": LORA})[0]
    spread = {"model": {}, "base": {"zero_stage": 2, "sequence_parallel": 2}}[name]
    require_same(four.run(train, folder / name, folder, {"lora": QLORA, **spread}), expected)


RESTING: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero2-on-host": {"zero_stage": 2, "offload": ON_HOST},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in ("zero1", "zero2-on-host"))) for name in RESTING]
)
def test_a_learner_that_rests_between_steps_trains_as_ever(name: str, alone: RankProcesses, folder: Path) -> None:
    """To the last bit: memory goes and comes, numbers do not change."""
    straight, resting = (
        alone.run(train, folder / "model", folder, RESTING[name] | more)[0] for more in ({}, {"rests": True})
    )
    assert (resting.losses, resting.norms) == (straight.losses, straight.norms)
    assert gap(resting.weights, straight.weights) == 0


BUILD = """
from pilaf_ray.engines.build_locks import clear_dead_locks, extensions_folder
from deepspeed.ops.op_builder import AsyncIOBuilder
clear_dead_locks(extensions_folder())
print("cannot" if not AsyncIOBuilder().is_compatible() else AsyncIOBuilder().load())
"""


@pytest.fixture(scope="module")
def asynchronous_io() -> None:
    """Built, if it is not yet: ten files, minutes on two cores."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=True)
    if "cannot" in done.stdout:
        pytest.skip("DeepSpeed's asynchronous I/O cannot be built: libaio-dev is not installed")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("asynchronous_io")
@pytest.mark.parametrize("parameters", [None, "nvme"])
@pytest.mark.parametrize("ranks", ["alone", "four"])
def test_training_with_a_disk(
    ranks: str, parameters: Any, request: pytest.FixtureRequest, every_weight: Training, folder: Path
) -> None:
    """Ranks that share one disk have files of their own there."""
    processes: RankProcesses = request.getfixturevalue(ranks)
    disk = OffloadSettings(optimizer="nvme", parameters=parameters, nvme_path=str(folder))
    require_same(processes.run(train, folder / "model", folder, {"zero_stage": 3, "offload": disk}), every_weight)
    assert [path for path in folder.rglob("*.swp") if path.stat().st_size], "something was written there"


# Last, because DeepSpeed keeps its groups of ranks for all later engines of a process.
@pytest.mark.parametrize("variant", [{"sequence_parallel": 2}, {"lora": LORA}], ids=["sequence", "adapters"])
def test_training_with_weights_kept_in_halves(
    variant: dict[str, Any], four: RankProcesses, every_weight: Training, adapters: Training, folder: Path
) -> None:
    found = four.run(train, folder / "model", folder, {"zero_stage": 3, "hybrid_ranks": 2, **variant})
    require_same(found, adapters if "lora" in variant else every_weight)
    require_one_whole_at_a_time(found, kept=KEPT + (ADAPTERS if "lora" in variant else 0))
    assert all(rank.kept_twice > 0 for rank in found)
