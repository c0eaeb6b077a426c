"""A whole run whose engine and learner take turns on one device: real Ray, real vLLM, real DeepSpeed, on CPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pilaf_ray.data.tiny_models import make_tiny_llama

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
STEPS = 4
TURNS = (
    "resources={turns: true, generator: {colocate: device}, learner: {colocate: device}}",
    "learner.zero_stage=2",
)


def losses(model: Path, runs: Path, name: str, *overrides: str) -> list[float]:
    words = [f"run.folder={runs}", f"run.name={name}", f"run.max_steps={STEPS}", f"model.policy={model}", *overrides]
    command = [sys.executable, "-c", "from pilaf_ray.cli import main; main()", "train", str(TINY), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss"] for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def log(runs: Path, name: str, role: str) -> str:
    return (runs / name / "logs" / "attempt_1" / f"{role}.log").read_text()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_turns_change_no_number_of_a_synchronous_run(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "policy", seed=0)
    synchronous = ("pipeline.max_staleness_steps=0", "learner.zero_stage=2")
    apart = losses(model, tmp_path, "apart", *synchronous)
    together = losses(model, tmp_path, "together", *synchronous, *TURNS)
    assert len(apart) == STEPS and together == pytest.approx(apart, abs=1e-6)
    # Both went and came once a step, and the learner once more for its start.
    for role, word in (("generator-0", "the engine rests"), ("learner-0", "the learner rests")):
        assert log(tmp_path, "together", role).count(word) >= STEPS
        assert word not in log(tmp_path, "apart", role)
    # Sampling ahead, the two alternate: what was sampled ahead is trained before more is sampled.
    ahead = losses(model, tmp_path, "ahead", "pipeline.max_staleness_steps=1", *TURNS)
    assert len(ahead) == STEPS
