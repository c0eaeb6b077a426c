"""ZeRO stages and ranks give the same training as one rank; checkpoints restore it."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from learner_batches import batch, weighted

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.rendezvous import free_address
from pilaf_ray.errors import NonFiniteLossError


def train(rank: int, ranks: int, stage: int, port: int, model: Path, out: Path, results: Any) -> None:
    from pilaf_ray.engines.learner import PolicyLearner

    learner = PolicyLearner(
        model_path=str(model),
        rank=rank,
        world_size=ranks,
        master_addr="127.0.0.1",
        master_port=port,
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
    results.put((rank, losses, refused))


def result(ranks: int, stage: int, model: Path, out: Path) -> tuple[list[float], str]:
    out.mkdir()
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    port = free_address()[1]
    processes = [
        spawn.Process(target=train, args=(rank, ranks, stage, port, model, out, results)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=200) for _ in processes)
    for process in processes:
        process.join()
    return answers[0][1], answers[0][2]


def test_stages_and_ranks_agree_and_checkpoints_restore(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_tiny_llama(model, seed=0)
    single, refused = result(1, 0, model, tmp_path / "one")
    assert single[4] == pytest.approx(single[5], abs=1e-6), "the step after a load repeats the step after the save"
    assert single[0] > single[2], "the loss falls on a fixed batch"
    assert "the loss is not finite; no weight was changed" in refused
    assert (tmp_path / "one" / "failed" / "step-5.json").exists()
    assert single[6] < single[5], "a refused batch leaves the weights as they were"
    assert single[7] == pytest.approx(single[8], abs=1e-6), "six times the loss of one pair of six is the pair's own"
    assert (tmp_path / "one" / "hf" / "model.safetensors").exists()
    for stage in (0, 2, 3):
        several, _ = result(2, stage, model, tmp_path / f"stage-{stage}")
        # Losses, and the norm of the first gradient: Adam alone would hide a wrong scale.
        assert several == pytest.approx(single, abs=1e-4)
