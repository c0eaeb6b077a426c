"""Whole runs on a tiny random model: real Ray, real vLLM, real DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pilaf_ray import build
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.oracle import make_oracle
from pilaf_ray.reference_loop import run_reference_loop

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    make_tiny_llama(folder, seed=0)
    return folder


def settings(model: Path, runs: Path, name: str, *overrides: str) -> list[str]:
    return [f"run.folder={runs}", f"run.name={name}", f"model.policy={model}", *overrides]


def start(overrides: list[str], *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from pilaf_ray.cli import main; main()", "train", str(TINY)]
    return subprocess.Popen([*command, *overrides, *flags], start_new_session=True)


def run(overrides: list[str], *flags: str) -> None:
    assert start(overrides, *flags).wait(timeout=500) == 0


def metrics(runs: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


async def reference_losses(config: RunConfig) -> list[float]:
    inputs = build.build_inputs(config)
    plans = build.PlanSource(prompts=inputs.train, sampler=inputs.sampler, seed=config.run.seed)
    return await run_reference_loop(
        policy_path=config.model.policy,
        reference_path=config.model.reference_path,
        plan=plans.plan,
        oracle=make_oracle(config.oracle.type, build.oracle_arguments(config, inputs)),
        loss=config.algorithm.type,
        beta=config.algorithm.beta,
        learning_rate=config.learner.learning_rate,
        batch_pairs=config.learner.batch_pairs,
        steps=config.run.max_steps,
        max_new_tokens=config.generation.max_new_tokens,
    )


async def test_synchronous_run_survives_sigkill_and_gives_the_reference_loops_losses(
    model: Path, tmp_path: Path
) -> None:
    overrides = settings(
        model,
        tmp_path,
        "sync",
        "run.max_steps=8",
        "pipeline.max_staleness_steps=0",
        "checkpoint.every_steps=2",
        "oracle.target=pilaf_ray.oracle.sentiment:score",
    )
    kill_after(overrides, tmp_path / "sync" / "metrics.jsonl", 3)
    run(overrides, "--resume")
    lines = metrics(tmp_path, "sync")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {line["age/max"] for line in lines} == {0}
    expected = await reference_losses(load_config(TINY, overrides))
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=2e-3)
    summary = json.loads((tmp_path / "sync" / "report" / "summary.json").read_text())
    assert (summary["pairs"], summary["labels"], summary["steps"]) == (32, 32, 8)


def kill_after(overrides: list[str], file: Path, lines: int) -> None:
    """Start a run and SIGKILL all of it once its metrics have so many lines."""
    process = start(overrides)
    deadline = time.monotonic() + 400
    while not (file.exists() and len(file.read_text().splitlines()) >= lines):
        assert process.poll() is None and time.monotonic() < deadline, f"the run ended before step {lines}"
        time.sleep(0.02)  # polling another process, not ordering work
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_iterative_run_survives_sigkill_in_its_second_round_and_equals_one_that_was_left_alone(
    model: Path, tmp_path: Path
) -> None:
    """Two rounds of 16 pairs in two passes, best of 4: 8 steps a round, killed in the second pass of the second."""
    common = (
        "run.max_steps=1000",
        "run.max_labels=40",
        "schedule={type: iterative, rounds: 5, pairs_per_round: 16, epochs: 2}",
        "sampler={type: best_of_n, n: 4}",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=1",
    )
    run(settings(model, tmp_path, "whole", *common))
    overrides = settings(model, tmp_path, "killed", *common)
    kill_after(overrides, tmp_path / "killed" / "metrics.jsonl", 14)
    run(overrides, "--resume")
    whole, killed = metrics(tmp_path, "whole"), metrics(tmp_path, "killed")
    assert [line["step"] for line in killed] == list(range(1, 17))
    for key in ("loss", "train/margin", "reward/policy", "age/max", "cost/generated_tokens", "total/labels"):
        assert [line[key] for line in killed] == pytest.approx([line[key] for line in whole], abs=2e-3), key
    assert [line["age/max"] for line in whole] == [*range(8)] * 2
    summary = json.loads((tmp_path / "killed" / "report" / "summary.json").read_text())
    assert summary["ended_by"] == "run.max_labels", "40 labels are two whole rounds of 16"
    assert (summary["pairs"], summary["labels"], summary["steps"]) == (32, 32, 16)
    per_pair = summary["costs_per_pair"]
    assert (per_pair["sequence_forwards"], per_pair["scoring_forwards"], per_pair["labelled_responses"]) == (4, 4, 2)


def test_asynchronous_run_keeps_the_bound_over_fifty_steps(model: Path, tmp_path: Path) -> None:
    run(
        settings(
            model, tmp_path, "async", "run.max_steps=50", "pipeline.max_staleness_steps=3", "weights.transport=gloo"
        )
    )
    lines = metrics(tmp_path, "async")
    assert len(lines) == 50
    assert 1 <= max(line["age/max"] for line in lines) <= 3
