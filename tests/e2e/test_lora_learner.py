"""Training adapters: the same losses, gradients and weights as plain torch and PEFT, on any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_batches import batch
from rank_processes import RankProcesses
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from pilaf_ray.data.tiny_models import make_tiny_qwen2
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.errors import CheckpointError

LORA = LoraSettings(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "gate_proj", "down_proj"))
BETA, LEARNING_RATE, CLIP, STEPS = 0.1, 1e-2, 1.0, 3


@dataclass(frozen=True)
class Trained:
    """What a rank 0 tells of its training; all of it plain numbers."""

    losses: list[float]
    norms: list[float]
    again: float
    """Loss of step 4 before and after a load."""
    resumed: float
    refused: str


def train(place: dict[str, Any], stage: int, model: Path, out: Path) -> Trained:
    from pilaf_ray.engines.learner import PolicyLearner

    for name in ("start", "end"):
        (out / name).mkdir(parents=True, exist_ok=True)
    trained = PolicyLearner(
        **place,
        model_path=str(model),
        zero_stage=stage,
        precision="float32",
        loss="dpo",
        beta=BETA,
        label_smoothing=0.0,
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        warmup_steps=0,
        total_steps=10,
        max_grad_norm=CLIP,
        micro_batch_tokens=48,
        lora=LORA,
        dump_folder=out / "failed",
    )
    trained.save(out / "start")
    engine, take_step = trained._engine, trained._engine.step
    gradients: list[dict[str, Tensor]] = []

    def noted() -> Any:
        found = engine.network.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in found if p.grad is not None})
        return take_step()

    engine.step = noted  # type: ignore[method-assign]
    steps = [trained.train_step(step, batch()) for step in range(1, STEPS + 1)]
    if place["rank"] == 0:
        torch.save(gradients, out / "gradients.pt")
    trained.save(out / "end")
    again = trained.train_step(4, batch()).loss
    trained.load(out / "end")
    resumed = trained.train_step(4, batch()).loss
    refused = ""
    try:
        TrainedOther(trained).load(out / "end")
    except CheckpointError as error:
        refused = str(error)
    norms = [step.metrics["grad_norm"] for step in steps]
    return Trained([step.loss for step in steps], norms, again, resumed, refused)


class TrainedOther:
    """The same learner, had it been told to adapt with another rank."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner

    def load(self, folder: Path) -> None:
        engine = self._learner._engine
        engine._lora = LoraSettings(rank=8, alpha=6.0, dropout=0.0, targets=LORA.targets)
        engine.load(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2(tmp_path_factory.mktemp("models") / "policy", seed=0)


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    out = tmp_path_factory.mktemp("single")
    with RankProcesses(1) as alone:
        return alone.run(train, 0, model, out)[0], out


@pytest.fixture(scope="module")
def two() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks


def adapters(checkpoint: Path) -> dict[str, Tensor]:
    """A and B by the names of the plain model's layers: ``….q_proj.lora_A``."""
    tensors = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    return {n.removeprefix("base_model.model.").removesuffix(".weight"): t for n, t in tensors.items()}


def dpo_loss(forward: Any) -> Tensor:
    """Mean DPO loss of the batch, one sequence at a time; ``forward`` gives logits (1, tokens, vocabulary)."""

    def logprob(prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
        logits = forward(torch.tensor([[*prompt, *response]]))[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()

    losses = []
    for item in batch():
        prompt, pair = item.pair.plan.prompt.token_ids, item.pair
        margin = logprob(prompt, pair.a.token_ids) - logprob(prompt, pair.b.token_ids)
        margin = BETA * (margin - (item.reference.a - item.reference.b))
        p = item.probability
        losses.append(-p * torch.nn.functional.logsigmoid(margin) - (1 - p) * torch.nn.functional.logsigmoid(-margin))
    return torch.stack(losses).mean()


def plain(model: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    network: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return network


def test_losses_gradients_and_weights_are_those_of_plain_torch(single: tuple[Trained, Path], model: Path) -> None:
    """W + (alpha/rank)·B·A by hand, autograd through it, clipping and AdamW on A and B."""
    trained, out = single
    network = plain(model)
    fixed = {name: p.detach() for name, p in network.named_parameters()}
    own = {name: t.clone().requires_grad_() for name, t in adapters(out / "start").items()}
    assert all(bool((t == 0).all()) for name, t in own.items() if name.endswith("lora_B")), "it starts as the reference"
    stems = [name.removesuffix(".lora_A") for name in own if name.endswith("lora_A")]
    assert len(stems) == 2 * len(LORA.targets)
    optimizer = torch.optim.AdamW(own.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    recorded = torch.load(out / "gradients.pt", weights_only=True)

    def forward(tokens: Tensor) -> Tensor:
        weights = dict(fixed)
        for s in stems:
            weights[f"{s}.weight"] = fixed[f"{s}.weight"] + 1.5 * own[f"{s}.lora_B"] @ own[f"{s}.lora_A"]
        logits: Tensor = functional_call(network, weights, (tokens,)).logits
        return logits

    for number in range(STEPS):
        optimizer.zero_grad()
        loss = dpo_loss(forward)
        loss.backward()
        assert trained.losses[number] == pytest.approx(loss.item(), abs=1e-5)
        assert set(recorded[number]) == {f"{name}.default.weight" for name in own}, "nothing else is trained"
        for name, tensor in own.items():
            torch.testing.assert_close(recorded[number][f"{name}.default.weight"], tensor.grad, atol=1e-5, rtol=1e-3)
        norm = torch.nn.utils.clip_grad_norm_(own.values(), CLIP)
        assert trained.norms[number] == pytest.approx(float(norm), rel=1e-4)
        optimizer.step()
    for name, tensor in adapters(out / "end").items():
        torch.testing.assert_close(tensor, own[name].detach(), atol=2e-4, rtol=0)


def test_the_checkpoint_is_what_peft_reads_and_merges(single: tuple[Trained, Path], model: Path) -> None:
    from peft import PeftModel

    _, out = single
    wrapped = PeftModel.from_pretrained(plain(model), out / "end" / "adapter")
    expected = dict(wrapped.merge_and_unload().named_parameters())
    saved = load_file(out / "end" / "hf" / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor.detach(), atol=1e-6, rtol=0)
    before = dict(plain(model).named_parameters())
    assert {n for n, t in saved.items() if not torch.equal(t, before[n])} == {
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    native = sum(file.stat().st_size for file in (out / "end" / "deepspeed").iterdir())
    assert native < sum(t.numel() * 4 for t in saved.values()), "frozen weights are not in it"


def test_a_loaded_checkpoint_goes_on_and_other_adapters_are_refused(single: tuple[Trained, Path]) -> None:
    trained, _ = single
    assert trained.losses[2] < trained.losses[0], "the loss falls on a fixed batch"
    assert trained.resumed == pytest.approx(trained.again, abs=1e-6)
    assert "trained with model.lora: rank 4, alpha 6, targets" in trained.refused
    assert "now it is: rank 8" in trained.refused


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_give_the_losses_of_one(
    stage: int, two: RankProcesses, single: tuple[Trained, Path], model: Path, tmp_path: Path
) -> None:
    several, one = two.run(train, stage, model, tmp_path)[0], single[0]
    found, expected = ([*t.losses, *t.norms, t.again, t.resumed] for t in (several, one))
    assert found == pytest.approx(expected, abs=1e-4)
    merged, alone = (load_file(folder / "end" / "hf" / "model.safetensors") for folder in (tmp_path, single[1]))
    for name, tensor in alone.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-3, rtol=0)
