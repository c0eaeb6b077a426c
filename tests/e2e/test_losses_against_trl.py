"""DPO and IPO, value and gradient, against TRL's trainer on TRL's own batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pilaf_ray.data.collate import collate
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.scoring import ScoringModel, load_network, sum_by_sequence
from pilaf_ray.losses.preference import LOSSES, PreferenceInputs
from pilaf_ray.types import TokenPair

trl = pytest.importorskip("trl")

ROWS = [
    {"prompt": "Name a film.", "chosen": " A long good answer here.", "rejected": " No."},
    {"prompt": "Why?", "chosen": " Rain", "rejected": " The river bank is near the village."},
]
BETA = 0.3


def trl_step(folder: Path, kind: str) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """TRL's loss, gradients and batch."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def model(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    arguments = trl.DPOConfig(
        output_dir=str(folder / "out"),
        loss_type=[kind],
        beta=BETA,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    trainer = trl.DPOTrainer(
        model("policy"),
        ref_model=model("reference"),
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}, batch


def sequences(batch: dict[str, torch.Tensor]) -> list[TokenPair]:
    """(prompt, response) of each row: first the chosen ones, then the rejected."""
    items = []
    for ids, mask, response in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        tokens = ids[mask.bool()].tolist()
        cut = len(tokens) - int(response.sum())
        items.append((tuple(tokens[:cut]), tuple(tokens[cut:])))
    return items


@pytest.mark.parametrize(("name", "kind"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_value_and_gradient_equal_trl(tmp_path: Path, name: str, kind: str) -> None:
    for seed, folder in enumerate(("policy", "reference")):
        make_tiny_llama(tmp_path / folder, seed=seed)
    expected, gradients, batch = trl_step(tmp_path, kind)
    items = sequences(batch)
    ours = collate(items)
    network = load_network(str(tmp_path / "policy"), dtype=torch.float32)
    reference = load_network(str(tmp_path / "reference"), dtype=torch.float32)
    policy_sums = sum_by_sequence(ScoringModel(network, chunk_tokens=3)(ours), ours)
    with torch.no_grad():
        reference_sums = sum_by_sequence(ScoringModel(reference, chunk_tokens=3)(ours), ours)
    lengths = torch.tensor([float(len(response)) for _, response in items])
    half = len(items) // 2
    inputs = PreferenceInputs(
        policy_a=policy_sums[:half],
        policy_b=policy_sums[half:],
        reference_a=reference_sums[:half],
        reference_b=reference_sums[half:],
        length_a=lengths[:half],
        length_b=lengths[half:],
        probability=torch.ones(half),
    )
    loss = LOSSES[name](inputs, beta=BETA).loss.mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for parameter_name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], atol=5e-5, rtol=1e-4)
