"""A run whose machine is gone goes on in an empty folder, with other numbers of ranks and generators."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.types import PairState

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def train(tmp_path: Path, folder: str, *more: str) -> None:
    overrides = [
        *(f"run.folder={tmp_path / folder}", "run.name=r", f"model.policy={tmp_path / 'model'}"),
        *("run.max_steps=6", "pipeline.max_staleness_steps=0", "evaluation.prompts=2", "learner.learning_rate=1e-4"),
        *("checkpoint.every_steps=2", "checkpoint.keep_last=9", f"checkpoint.mirror=file://{tmp_path / 'mirror'}"),
    ]
    command = [sys.executable, "-c", "from pilaf_ray.cli import main; main()", "train", str(TINY)]
    subprocess.run([*command, *overrides, *more], check=True, timeout=300)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.long
def test_what_was_copied_is_enough_to_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model", seed=0)
    train(tmp_path, "here", "learner.ranks=2")
    whole = lines(tmp_path / "here" / "r", "metrics.jsonl")
    mirror = tmp_path / "mirror" / "r"
    assert sorted(path.name for path in mirror.iterdir())[-1] == "step-000006"
    assert (mirror / "latest").read_text() == "step-000006"
    events = [event["event"] for event in lines(tmp_path / "here" / "r", "events.jsonl")]
    assert events.count("checkpoint copied") + events.count("checkpoint copy skipped") == 3
    # The machine is lost before the last copy.
    shutil.rmtree(mirror / "step-000006")
    newest = max(int(path.name.removeprefix("step-")) for path in mirror.glob("step-*"))
    manifest = json.loads((mirror / f"step-{newest:06d}" / "checkpoint" / "manifest.json").read_text())
    assert manifest["learners"] == {"learner": {"ranks": 2, "zero_stage": 1}}
    train(tmp_path, "there", "--restartable", "generation.replicas=3")
    there = tmp_path / "there" / "r"
    found = lines(there, "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[:newest] == whole[:newest], "what was done is on record"
    losses = [[line["loss"] for line in lines_[newest:]] for lines_ in (found, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    loaded = [event["step"] for event in lines(there, "events.jsonl") if event["event"] == "checkpoint loaded"]
    assert loaded == [newest]
    reader = LedgerReader(f"sqlite:///{there / 'preferences.db'}")
    assert reader.counts().check()[PairState.TRAINED] == 24
    reader.close()
