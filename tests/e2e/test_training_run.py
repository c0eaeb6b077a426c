"""Whole runs on a tiny random model: real Ray, real vLLM, real DeepSpeed."""

import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from event_files import scalars

from pilaf_ray import build
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.oracle import make_oracle
from pilaf_ray.reference_loop import run_reference_loop
from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.types import PairState

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
FUNCTIONS = Path(__file__).parents[1] / "unit"
"""Where runs find the oracles of ``oracle_functions.py``."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    make_tiny_llama(folder, seed=0)
    return folder


def settings(model: Path, runs: Path, name: str, *overrides: str) -> list[str]:
    return [f"run.folder={runs}", f"run.name={name}", f"model.policy={model}", *overrides]


def start(overrides: list[str], *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from pilaf_ray.cli import main; main()", "train", str(TINY)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FUNCTIONS), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([*command, *overrides, *flags], start_new_session=True, env=environment)


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
        oracle=make_oracle(config.scoring_oracle.type, build.oracle_arguments(config.scoring_oracle, gpus=0)),
        loss=config.algorithm.type,
        beta=config.algorithm.beta,
        learning_rate=config.learner.learning_rate,
        batch_pairs=config.learner.batch_pairs,
        steps=config.run.max_steps,
        max_new_tokens=config.generation.max_new_tokens,
    )


SYNCHRONOUS = (
    "run.max_steps=8",
    "pipeline.max_staleness_steps=0",
    "checkpoint.every_steps=2",
    "oracle.target=pilaf_ray.oracle.sentiment:score",
    # Adam's first steps go by the sign of the gradient, also where that is rounding: with larger steps the two
    # implementations' probabilities drift apart by 1e-3, and now and then a draw falls between them.
    "learner.learning_rate=1e-4",
    # What shares a batch with others is summed in another order: alone, each has the same last digits in every run.
    "generation.max_num_seqs=1",
    "pipeline.label_batch_pairs=1",
)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that holds the synchronous run ``whole``."""
    runs = tmp_path_factory.mktemp("runs")
    run(settings(model, runs, "whole", *SYNCHRONOUS))
    return runs


def without_times(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if not key.startswith(("time/", "busy/", "total/seconds"))}


def trained_weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights that a run of eight steps ended with, by file."""
    files = sorted((folder / "checkpoints/step-000008/learner/hf").glob("*.safetensors"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def kill_in_step(process: subprocess.Popen[bytes], folder: Path, step: int, batch: int) -> None:
    """SIGKILL while the learner is at ``step``: its pairs are labelled, all earlier ones trained, nothing else is open.

    In the synchronous setting the ledger looks like this from the last label until the step is over.
    """
    deadline, file = time.monotonic() + 400, folder / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < step - 1:
        assert process.poll() is None and time.monotonic() < deadline, f"the run ended before step {step}"
        time.sleep(0.002)  # polling another process, not ordering work
    reader = LedgerReader(f"sqlite:///{folder / 'preferences.db'}")
    while reader.counts()[PairState.LABELED] < batch:
        assert process.poll() is None and time.monotonic() < deadline, f"the run ended before step {step}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    counts = reader.counts().check()
    assert (counts[PairState.TRAINED], counts[PairState.LABELED]) == (batch * (step - 1), batch), "between two steps"
    reader.close()


def assert_replays(runs: Path, name: str, step: int, *, first: int) -> None:
    """Steps ``first`` to ``step`` are executed again and give the losses that the run wrote down, to the last digit."""
    command = ["from pilaf_ray.cli import main; main()", "replay", str(runs / name), "--step", str(step)]
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"step (\d+): recorded ([\d.]+), replayed ([\d.]+)", done.stdout)
    expected = {line["step"]: f"{line['loss']:.8f}" for line in metrics(runs, name)}
    assert found == [(str(n), expected[n], expected[n]) for n in range(first, step + 1)]


async def test_synchronous_run_gives_the_reference_loops_losses(model: Path, uninterrupted: Path) -> None:
    lines = metrics(uninterrupted, "whole")
    assert {line["age/max"] for line in lines} == {0}
    config = load_config(TINY, settings(model, uninterrupted, "whole", *SYNCHRONOUS))
    assert [line["loss"] for line in lines] == pytest.approx(await reference_losses(config), abs=1e-3)
    assert_replays(uninterrupted, "whole", 8, first=7)


def kill_after(overrides: list[str], file: Path, lines: int) -> None:
    """Start a run and SIGKILL all of it once its metrics have so many lines."""
    process = start(overrides)
    deadline = time.monotonic() + 400
    while not (file.exists() and len(file.read_text().splitlines()) >= lines):
        assert process.poll() is None and time.monotonic() < deadline, f"the run ended before step {lines}"
        time.sleep(0.02)  # polling another process, not ordering work
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_iterative_run_survives_sigkill_in_its_second_round_and_equals_one_that_was_left_alone(
    model: Path, tmp_path: Path
) -> None:
    """Two rounds of 16 pairs in two passes, best of 4: 8 steps a round, killed in the second pass of the second."""
    common = (
        "run.max_steps=1000",
        "run.max_labels=40",
        "schedule={type: iterative, rounds: 5, pairs_per_round: 16, epochs: 2}",
        "sampler={type: best_of_n, n: 4}",
        # Ties at the reference have gradients of rounding alone, and Adam makes whole steps of them.
        *("oracle.target=oracle_functions:lengths", "oracle.scale=0.1", "learner.learning_rate=1e-4"),
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


def test_killed_in_the_middle_of_a_step_and_resumed_it_equals_the_uninterrupted_run(
    model: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    logging = ("logging.tensorboard=true", "logging.prometheus=true")
    overrides = settings(model, tmp_path, "killed", *SYNCHRONOUS, *logging)
    kill_in_step(start(overrides), tmp_path / "killed", 4, 4)
    served_at = tmp_path / ".prometheus" / "killed.json"
    assert re.fullmatch(r'\[\{"targets": \["[\d.]+:\d+"\]\}\]\n', served_at.read_text())
    run(overrides, "--resume")
    assert not served_at.exists(), "a run that is over is served nowhere"
    for found, expected in zip(metrics(tmp_path, "killed"), metrics(uninterrupted, "whole"), strict=True):
        assert without_times(found) == without_times(expected)
    assert trained_weights(tmp_path / "killed") == trained_weights(uninterrupted / "whole"), "bit for bit"
    shown, lines = scalars(tmp_path / "killed" / "tensorboard"), metrics(tmp_path, "killed")
    assert set(shown) == {key for line in lines for key in line} - {"step"}
    for key, points in shown.items():
        assert points == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if key in line], key
    summaries = [
        json.loads((runs / name / "report" / "summary.json").read_text())
        for runs, name in ((uninterrupted, "whole"), (tmp_path, "killed"))
    ]
    for summary in summaries:
        assert (summary["pairs"], summary["labels"], summary["steps"]) == (32, 32, 8)
        assert set(summary["ended"].values()) == {0}
    for key in ("reward_before", "reward_after", "kl"):
        assert summaries[0][key] == summaries[1][key], key
    with closing(sqlite3.connect(tmp_path / "killed" / "preferences.db")) as connection:
        verdicts = connection.execute("SELECT sampling, count(*) FROM labels GROUP BY 1 ORDER BY 1").fetchall()
    # Checkpoint 2 was the last: of step 3 the responses stay, those of step 4 came from weights that are gone.
    assert verdicts == [(0, 32), (1, 4)], "every label event is in the log, and each pair carries one"


@pytest.mark.parametrize(("bound", "transport"), [pytest.param(1, "filesystem", marks=pytest.mark.long), (3, "gloo")])
def test_asynchronous_run_keeps_the_bound_over_fifty_steps(
    model: Path, tmp_path: Path, bound: int, transport: str
) -> None:
    run(
        settings(
            *(model, tmp_path, "async", "run.max_steps=50"),
            *(f"pipeline.max_staleness_steps={bound}", f"weights.transport={transport}"),
        )
    )
    lines = metrics(tmp_path, "async")
    assert len(lines) == 50
    assert 1 <= max(line["age/max"] for line in lines) <= bound
    if bound == 3:
        # Its only checkpoint is that of the last step: from the run's beginning on.
        assert_replays(tmp_path, "async", 3, first=1)
