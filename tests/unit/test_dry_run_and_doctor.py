"""What is said before anything heavy starts."""

import json
import sys
from pathlib import Path

import pytest

from pilaf_ray import cli, doctor
from pilaf_ray.data.tiny_models import make_tiny_llama

ROOT = Path(__file__).parents[2]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pilaf-ray", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_dry_run_prints_roles_prompts_and_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_tiny_llama(tmp_path / "policy", seed=0)
    words = ("train", str(ROOT / "configs/tiny.yaml"), f"model.policy={policy}", f"run.folder={tmp_path}", "--dry-run")
    assert call(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    for role in ("generator", "reference", "oracle", "policy learner"):
        assert role in out
    assert "4 held out" in out
    assert "3 steps (run.max_steps) of 4 pairs = 12 labels, about 36 sequence forwards" in out
    assert not (tmp_path / "tiny").exists()


def test_dry_run_refuses_a_missing_model_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", str(ROOT / "configs/tiny.yaml"), "model.policy=/nowhere/policy", "--dry-run")
    assert call(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.policy: there is no model in the folder '/nowhere/policy'")
    assert error.count("\n") == 1


def test_dry_run_refuses_a_reference_with_another_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, reference = (make_tiny_llama(tmp_path / name, seed=0) for name in ("policy", "reference"))
    file = reference / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(tokenizer))
    overrides = (f"model.policy={policy}", f"model.reference={reference}")
    capsys.readouterr()
    assert call(monkeypatch, "train", str(ROOT / "configs/tiny.yaml"), *overrides, "--dry-run") == 2
    error = capsys.readouterr().err
    assert "different vocabularies (2 tokens, e.g. 'a': " in error
    assert error.count("\n") == 1


def test_doctor_names_what_is_missing_and_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._package("ray", None)[1] == "not installed"
    assert doctor._package("ray", None)[2]
    assert doctor._package("wandb", None)[2] == ""
    assert "made for ray==" in doctor._package("ray", "1.0.0")[2]
    assert doctor._package("torch", "2.13.0+cpu")[2] == ""


def test_doctor_reports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    doctor.print_report()
    out = capsys.readouterr().out
    for what in ("python", "vllm", "cores", "vector units", "GPUs", "free memory", "what fits", "port 6379", "wandb"):
        assert what in out
