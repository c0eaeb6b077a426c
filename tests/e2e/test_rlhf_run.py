"""Whole runs against a reward model on a tiny random model: real Ray, real vLLM, real DeepSpeed."""

import json
import sqlite3
from pathlib import Path

import pytest
from test_training_run import metrics, run, settings

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.sampling.identity import is_held_out

HELD_OUT = 0.25
REWARD = (
    "reward_model={precision: float32, learning_rate: 1.0e-3, batch_pairs: 3, steps_per_batch: 2, "
    f"replay: {{held_out: {HELD_OUT}, uses: 2}}, health: {{window_pairs: 8}}}}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    make_tiny_llama(folder, seed=0)
    return folder


@pytest.mark.long
def test_a_stopped_ppo_run_goes_on_as_if_it_had_not_been_stopped(model: Path, tmp_path: Path) -> None:
    algorithm = "algorithm={type: ppo, beta: 0.1, batch_prompts: 6, epochs: 2, value: {learning_rate: 1.0e-3}}"
    common = ["pipeline.max_staleness_steps=0", "checkpoint.every_steps=2", REWARD, algorithm]
    run(settings(model, tmp_path, "whole", "run.max_steps=4", *common))
    run(settings(model, tmp_path, "cut", "run.max_steps=2", *common))
    run(settings(model, tmp_path, "cut", "run.max_steps=4", *common), "--resume")
    whole, cut = metrics(tmp_path, "whole"), metrics(tmp_path, "cut")
    assert len(whole) == 4
    for ours, expected in zip(cut, whole, strict=True):
        # Counts are exact. Losses are not: a token may fall the other way where rounding differs between batches.
        for key in (
            "step",
            "rollouts/reward_version",
            "rollouts/responses",
            "reward_model/version",
            "reward_model/steps",
        ):
            assert ours.get(key) == expected.get(key), f"step {ours['step']}: {key}"
        # r̂ takes no step before it has a batch.
        assert ("reward_model/loss" in ours) == (ours["step"] > 1)
        assert ours.get("reward_model/loss", 0) == pytest.approx(expected.get("reward_model/loss", 0), abs=0.05)
    assert {line["rollouts/age_max"] for line in whole} == {0}
    assert [line["rollouts/reward_version"] for line in whole] == [0, 0, 2, 4]
    uses = trained_on(tmp_path / "cut")
    assert uses == trained_on(tmp_path / "whole") and max(uses.values()) <= 2
    assert not any(is_held_out(name, HELD_OUT) for name in uses)
    last = tmp_path / "cut" / "checkpoints" / "step-000004"
    for folder in ("learner", "learner/value", "reward"):
        assert (last / folder / "hf" / "model.safetensors").exists()
    summary = json.loads((tmp_path / "cut" / "report" / "summary.json").read_text())
    assert (summary["pairs"], summary["steps"]) == (16, 4)
    assert "reward" in summary["peak_memory_mib"]


@pytest.mark.parametrize("kind", ["rloo", pytest.param("grpo", marks=pytest.mark.long)])
def test_groups_and_ties(kind: str, model: Path, tmp_path: Path) -> None:
    """Random tokens hardly ever hold a word of the lexicon: nearly all labels are ties, and some groups are equal."""
    run(
        settings(
            model,
            tmp_path,
            kind,
            "pipeline.max_staleness_steps=1",
            "weights.transport=gloo",
            REWARD,
            f"algorithm={{type: {kind}, batch_prompts: 2, group_size: 3}}",
        )
    )
    lines = metrics(tmp_path, kind)
    assert len(lines) == 3
    assert all(line["rollouts/age_max"] <= 1 and line["rollouts/responses"] == 6 for line in lines)
    assert all(abs(line["loss"]) < 100 for line in lines), "finite"


def trained_on(run_folder: Path) -> dict[str, int]:
    """How often r̂ was trained on each pair, as the ledger has it."""
    with sqlite3.connect(run_folder / "preferences.db") as database:
        query = "select pair_id, sum(uses) from reward_uses join pairs using (plan_index) group by pair_id"
        return dict(database.execute(query).fetchall())
