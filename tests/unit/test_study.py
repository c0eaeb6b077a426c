"""The study: policies are judged together, and each run keeps what was said of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from benchmarks import study
from pilaf_ray.comparison_run import PlannedRun
from pilaf_ray.errors import PilafError


def finished(folder: Path, name: str) -> Path:
    """A run that is done and still has its policy."""
    run = folder / "runs" / name
    for part in ("report", "checkpoints"):
        (run / part).mkdir(parents=True)
    (run / "report/summary.json").write_text("{}")
    return run


def test_each_run_keeps_its_own_answers_and_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [finished(tmp_path, name) for name in ("pilaf-seed1", "pilaf-seed10")]
    asked: list[tuple[str, ...]] = []

    def evaluate(*words: str) -> None:
        asked.append(words)
        results = {f"{run.name}/step-000020": {"rewards": [float(len(run.name))]} for run in runs}
        Path(words[-1]).write_text(json.dumps({"results": results | {"reference": {"rewards": [0.5]}}}))

    monkeypatch.setattr(study, "_pilaf_ray", evaluate)
    study.judge(runs, samples=3, file=tmp_path / "judged.json")
    (words,) = asked
    assert words[:3] == ("evaluate", *map(str, runs)) and words[5:7] == ("--samples", "3")
    for run, own in zip(runs, (11.0, 12.0), strict=True):
        told = json.loads((run / "final.json").read_text())["results"]
        assert told == {f"{run.name}/step-000020": {"rewards": [own]}, "reference": {"rewards": [0.5]}}


def test_policies_are_judged_once_a_seed_and_before_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[list[str]] = []
    monkeypatch.setattr(study, "execute_run", lambda run: finished(tmp_path / "online", run.folder.name))
    monkeypatch.setattr(study, "judge", lambda runs, **_: judged.append([run.name for run in runs]))
    clock = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(study, "time", clock)
    (setting,) = [setting for setting in study.SETTINGS if setting.name == "online"]
    trial = study.Study(
        setting, folder=tmp_path, results=tmp_path, samplers=("vanilla", "pilaf"), seeds=(0, 1),
        deadline=60.0, labels=None, samples=2, overrides=(), console=Console(),
    )  # fmt: skip
    names = [f"{sampler}-seed{seed}" for seed in (0, 1) for sampler in ("vanilla", "pilaf")]
    runs = [cast(Any, SimpleNamespace(folder=Path(name))) for name in names]
    for run in runs[:3]:
        trial._execute(cast(PlannedRun, run))
    assert judged == [["pilaf-seed0", "vanilla-seed0"]]
    assert not (tmp_path / "online/runs/pilaf-seed0/checkpoints").exists()
    clock.monotonic = lambda: 61.0
    with pytest.raises(PilafError, match="the time is up"):
        trial._execute(cast(PlannedRun, runs[3]))
    assert judged[1:] == [["vanilla-seed1"]]
    clock.monotonic = lambda: 0.0
    trial._samples = 0
    trial._execute(cast(PlannedRun, runs[3]))
    trial._judge()
    assert len(judged) == 2 and (tmp_path / "online/runs/pilaf-seed1/checkpoints").exists()


def test_a_setting_may_start_where_another_does(tmp_path: Path) -> None:
    (setting,) = [setting for setting in study.SETTINGS if setting.name == "iterative"]
    trial = study.Study(
        setting, folder=tmp_path, results=tmp_path, samplers=("vanilla",), seeds=(0,), deadline=0.0,
        labels=None, samples=0, overrides=(), console=Console(),
    )  # fmt: skip
    with pytest.raises(PilafError, match="run online first"):
        trial.run()
    checkpoints = tmp_path / "online/runs/warm-start/checkpoints"
    for step in ("step-000008", "step-000010"):
        (checkpoints / step).mkdir(parents=True)
    assert trial._start() == [f"model.init_from={checkpoints / 'step-000010'}"]
