"""ZeRO stages and ranks give the same training as one rank; checkpoints restore it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from learner_batches import batch, weighted
from rank_processes import RankProcesses

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.errors import NonFiniteLossError


def train(place: dict[str, Any], stage: int, model: Path, out: Path) -> tuple[list[float], str]:
    from pilaf_ray.engines.learner import PolicyLearner

    learner = PolicyLearner(
        **place,
        model_path=str(model),
        zero_stage=stage,
        precision="float32",
        loss="dpo",
        beta=0.1,
        label_smoothing=0.0,
        learning_rate=1e-3,
        lr_schedule="constant",
        warmup_steps=0,
        total_steps=10,
        micro_batch_tokens=48,
        dump_folder=out / "failed",
    )
    steps = [learner.train_step(step, batch()) for step in (1, 2, 3)]
    losses = [step.loss for step in steps] + [steps[0].metrics["grad_norm"]]
    learner.save(out)
    losses.append(learner.train_step(4, batch()).loss)
    learner.load(out)
    losses.append(learner.train_step(4, batch()).loss)
    refused = ""
    try:
        learner.train_step(5, batch(reference=float("nan")))
    except NonFiniteLossError as error:
        refused = str(error)
    losses.append(learner.train_step(5, batch()).loss)
    heavy = [weighted(item, 6.0 if number == 0 else 0.0) for number, item in enumerate(batch())]
    for items in (heavy, batch()[:1]):
        learner.load(out)
        losses.append(learner.train_step(4, items).loss)
    return losses, refused


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=0)


@pytest.fixture(scope="module")
def two() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks


def test_stages_and_ranks_agree_and_checkpoints_restore(model: Path, two: RankProcesses, tmp_path: Path) -> None:
    for name in ("one", *(f"stage-{stage}" for stage in (0, 2, 3))):
        (tmp_path / name).mkdir()
    with RankProcesses(1) as alone:
        single, refused = alone.run(train, 0, model, tmp_path / "one")[0]
    assert single[4] == pytest.approx(single[5], abs=1e-6), "the step after a load repeats the step after the save"
    assert single[0] > single[2], "the loss falls on a fixed batch"
    assert "the loss is not finite; no weight was changed" in refused
    assert (tmp_path / "one" / "failed" / "step-5.json").exists()
    assert single[6] < single[5], "a refused batch leaves the weights as they were"
    assert single[7] == pytest.approx(single[8], abs=1e-6), "six times the loss of one pair of six is the pair's own"
    assert (tmp_path / "one" / "hf" / "model.safetensors").exists()
    for stage in (0, 2, 3):
        several, _ = two.run(train, stage, model, tmp_path / f"stage-{stage}")[0]
        # Losses, and the norm of the first gradient: Adam alone would hide a wrong scale.
        assert several == pytest.approx(single, abs=1e-4)
