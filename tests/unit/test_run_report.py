"""The page about runs: its figures, its marks, and nothing from the network."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pilaf_ray.errors import RunFolderError
from pilaf_ray.evaluation.figures import spread
from pilaf_ray.evaluation.run_records import config_differences, read_run
from pilaf_ray.evaluation.run_report import run_report
from pilaf_ray.evaluation.statistics import mean


def write_run(folder: Path, *, sampler: str = "pilaf", finished: bool = True, shift: float = 0.0) -> Path:
    """A run folder as the training writes it: 4 steps of 8 pairs, evaluated at 0, 2 and 4."""
    config = {
        "run": {"name": folder.name, "max_steps": 4},
        "sampler": {"type": sampler},
        "algorithm": {"type": "dpo", "beta": 0.1},
        "learner": {"batch_pairs": 8},
        "pipeline": {"max_staleness_steps": 1},
    }
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    steps = range(1, 5)
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 0.7, "train/accuracy": 0.5, "reward/policy": None if step == 2 else 0.1 * step}
        | {"total/labels": 8.0 * step, "total/generated_tokens": 170.0 * step, "cost/sequence_forwards": 24.0}
        | {"age/max": 1, "response/tokens": 10.0 + step, "time/wait": 0.5, "time/train": 1.0, "time/push": 0.25}
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (0, 2, 4):
        result = {
            "step": step,
            "prompts": [f"prompt <{n}>" for n in range(6)],
            "responses": [f"answer {n} of step {step}" for n in range(6)],
            "rewards": [0.1 * n + 0.2 * step + shift for n in range(6)],
            "kls": [0.5 * step + 0.1 * n for n in range(6)],
            "lengths": [10] * 6,
        }
        (folder / "evaluations" / f"step-{step:06d}.json").write_text(json.dumps(result))
    if finished:
        summary = {
            "wall_seconds": 30.0,
            "pairs": 32,
            "utilization": {"generator": 0.5, "learner": 0.25},
            "peak_memory_mib": {"generator": 800.0, "learner": 1200.0},
            "seconds": {"start": 10.0, "training": 7.0},
        }
        (folder / "report").mkdir()
        (folder / "report" / "summary.json").write_text(json.dumps(summary))
    return folder


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = run_report([read_run(write_run(tmp_path / "one")), read_run(write_run(tmp_path / "two", shift=0.5))])
    assert not re.search(r"<(script|link|img)\b|\bsrc=|@import|url\(http", page)
    assert "prompt &lt;0&gt;" in page and "prompt <0>" not in page
    identifiers = re.findall(r'\bclip-path="url\(#(\w+)\)"', page)
    assert identifiers and all(page.count(f'id="{name}"') == 1 for name in set(identifiers))


def test_numbers_of_the_page_are_those_of_the_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = read_run(write_run(tmp_path / "one"))
    page = run_report([run])
    rewards = [0.1 * n + 0.8 for n in range(6)]
    kls = [2.0 + 0.1 * n for n in range(6)]
    for value in (mean(rewards), mean(rewards) - 0.1 * mean(kls)):
        assert f'<td>{value:.3f} <span class="limits">[' in page
    assert "<td>32</td><td>4</td><td>96</td><td>680</td>" in page  # labels, steps, forwards, tokens
    assert run.generated_tokens == [0, 170, 340, 510, 680] and run.labels[2] == 16
    assert run.seconds == pytest.approx([0, 1.75, 3.5, 5.25, 7.0])


def test_unfinished_run_is_marked(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = run_report([read_run(write_run(tmp_path / "early", finished=False))])
    assert "Partial: early has not finished: 4 steps so far" in page
    assert "Partial" not in run_report([read_run(write_run(tmp_path / "late"))])


def test_differences_name_only_what_differs(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, sampler=name)) for name in ("vanilla", "pilaf")]
    assert config_differences(runs) == {"sampler.type": ["vanilla", "pilaf"]}


def test_not_a_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="nothing was evaluated yet"):
        read_run(tmp_path)


def test_labels_keep_their_distance_and_their_order() -> None:
    assert spread([0.1, 0.5], gap=0.1) == [0.1, 0.5]
    assert spread([0.5, 0.5], gap=0.1) == pytest.approx([0.45, 0.55])
    heights = spread([0.2, 0.25, 0.3, 0.9], gap=0.1)
    assert heights == pytest.approx([0.15, 0.25, 0.35, 0.9])
