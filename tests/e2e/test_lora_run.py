"""A whole run that trains adapters: real Ray, real vLLM, real DeepSpeed, a random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.evaluation_run import REFERENCE, evaluate

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
LORA = "model.lora={rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}"


def train(model: Path, runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = [str(TINY), f"run.folder={runs}", "run.name=lora", f"model.policy={model}", LORA, *overrides]
    environment = {**os.environ, "RAY_DEDUP_LOGS": "0"}
    command = [sys.executable, "-c", "from pilaf_ray.cli import main; main()", "train", *words]
    return subprocess.run(command, timeout=500, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_a_run_ends_resumes_and_its_checkpoint_evaluates(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "policy", seed=0)
    # Every update is probed: the engine must serve what the learner computes with its adapters apart.
    common = ("learner.ranks=2", "learner.zero_stage=3", "weights.transport=gloo", "weights.probe_tolerance=0.001")
    common = (*common, "learner.learning_rate=1e-2", "checkpoint.every_steps=2")
    first = train(model, tmp_path, *common, "run.max_steps=3")
    assert first.returncode == 0, first.stderr
    second = train(model, tmp_path, *common, "run.max_steps=5", "--resume")
    assert second.returncode == 0, second.stderr
    run = tmp_path / "lora"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    learner = run / "checkpoints" / "step-000005" / "learner"
    saved, base = load_file(learner / "hf" / "model.safetensors"), load_file(model / "model.safetensors")
    changed = {name.rpartition(".layers.")[2].partition(".")[2] for name in saved if not saved[name].equal(base[name])}
    assert changed == {"self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.down_proj.weight"}
    assert json.loads((learner / "adapter" / "adapter_config.json").read_text())["r"] == 4
    found = evaluate([run], config=None, overrides=[], prompts=4)
    assert found.policies[REFERENCE].kl.value == pytest.approx(0.0, abs=1e-3)
    assert found.policies["lora/step-000005"].kl.value > found.policies[REFERENCE].kl.value
    refused = train(model, tmp_path, *common, "run.max_steps=6", "model.lora.rank=2", "--resume")
    assert refused.returncode != 0
    assert "trained with model.lora: rank 4" in refused.stderr


@pytest.mark.long
def test_a_run_on_four_bits_serves_the_base_that_it_trains(tmp_path: Path) -> None:
    """On two ranks that compute the same rows together."""
    pytest.importorskip("bitsandbytes")
    model = make_tiny_llama(tmp_path / "policy", seed=0)
    # The probe would tell an engine that still has the weights which the 4 bits come from.
    settings = ("learner.ranks=2", "learner.sequence_parallel=2", "weights.probe_tolerance=0.001")
    settings = (*settings, "learner.learning_rate=1e-2", "model.lora.quantise=nf4", "run.max_steps=3")
    ended = train(model, tmp_path, *settings)
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "lora"
    before, base = (load_file(folder / "model.safetensors") for folder in (model, run / "base"))
    assert max(float((base[name] - before[name]).abs().max()) for name in base) > 0.05
    (checkpoint,) = (run / "checkpoints").glob("step-000003")
    saved = load_file(checkpoint / "learner" / "hf" / "model.safetensors")
    changed = {name.rpartition(".layers.")[2].partition(".")[2] for name in saved if not saved[name].equal(base[name])}
    assert changed == {"self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.down_proj.weight"}
    found = evaluate([run], config=None, overrides=[], prompts=4)
    assert found.policies[REFERENCE].kl.value == pytest.approx(0.0, abs=1e-3)
