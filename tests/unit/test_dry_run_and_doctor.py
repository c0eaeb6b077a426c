"""What is said before anything heavy starts."""

import json
import sys
from pathlib import Path

import pytest
from listeners import closed_port

from pilaf_ray import cli, doctor
from pilaf_ray.config.loader import load_config
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.model_store import FOLDER_VARIABLE, local_model
from pilaf_ray.errors import ConfigError
from pilaf_ray.model_copies import with_local_settings

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


def test_dry_run_says_where_the_placement_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, address = make_tiny_llama(tmp_path / "policy", seed=0), closed_port()
    words = (str(ROOT / "configs/tiny.yaml"), f"model.policy={policy}", f"resources.address={address}", "--dry-run")
    assert call(monkeypatch, "train", *words) == 0
    _, _, line = " ".join(capsys.readouterr().out.split()).partition("placement: ")
    assert line.startswith(f"not checked (no Ray head answers at {address} (Connection refused): start it")
    assert "a run checks it when it has joined the cluster, before any role starts, or list resources.nodes" in line


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


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine keeps models of URLs, empty."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "store"))
    return tmp_path / "store"


def test_dry_run_of_a_model_at_a_url_names_the_url_and_fetches_no_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_store: Path
) -> None:
    url = f"file://{make_tiny_llama(tmp_path / 'policy', seed=0)}"
    words = ("train", str(ROOT / "configs/tiny.yaml"), f"model.policy={url}", f"run.folder={tmp_path}", "--dry-run")
    assert call(monkeypatch, *words) == 0
    out = "".join(capsys.readouterr().out.split())
    assert "4heldout" in out and str(own_store) not in out
    assert list(own_store.rglob("tokenizer.json")) and not list(own_store.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("setting", "name", "complaint"),
    [
        ("model.policy", "missing", "cannot be listed (FileNotFoundError"),
        ("model.reference", "", "no config.json there"),
    ],
)
def test_dry_run_refuses_a_url_without_a_model_in_one_line(
    setting: str, name: str, complaint: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_store: Path,
) -> None:  # fmt: skip
    policy = make_tiny_llama(tmp_path / "bucket" / "policy", seed=0)
    capsys.readouterr()
    url = f"file://{tmp_path}/bucket/{name}"
    words = (f"model.policy={policy}", f"{setting}={url}", "--dry-run")
    assert call(monkeypatch, "train", str(ROOT / "configs/tiny.yaml"), *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {url}") and complaint in error
    assert error.count("\n") == 1


def test_doctor_looks_at_the_models_of_a_configuration(tmp_path: Path, own_store: Path) -> None:
    url = f"file://{make_tiny_llama(tmp_path / 'policy', seed=0)}"
    config = load_config(ROOT / "configs/tiny.yaml", [f"model.policy={url}", "model.reference=file:///no/where"])
    found, missing, kept = doctor._models(config)
    assert found[0] == url and found[1].endswith("GiB, not fetched to this machine yet") and not found[2]
    assert missing[0] == "file:///no/where" and "cannot be listed" in missing[2] and "\n" not in missing[2]
    assert kept[1].startswith(str(own_store))
    local_model(url)
    assert next(iter(doctor._models(config)))[1].endswith("a copy is here")
    assert list(doctor._models(None)) == list(doctor._models(load_config(ROOT / "configs/tiny.yaml"))) == []


def test_models_are_looked_at_in_copies_and_the_configuration_keeps_its_urls(tmp_path: Path, own_store: Path) -> None:
    url = f"file://{make_tiny_llama(tmp_path / 'policy', seed=0)}"
    overrides = [f"model.policy={url}", f"reward_model={{path: '{url}'}}", "model.reference=owner/model"]
    config = load_config(ROOT / "configs/tiny.yaml", overrides)
    before = config.model_dump()
    local = with_local_settings(config)
    assert config.model_dump() == before and local.reward_model is not None
    assert local.model.policy == local.reward_model.path and Path(local.model.policy).is_relative_to(own_store)
    assert local.model.reference == "owner/model" and local.learner == config.learner


def test_a_checkpoint_of_adapters_is_looked_at_as_it_is() -> None:
    """Its policy is not the reference, which no configuration may say."""
    config = load_config(ROOT / "configs/tiny.yaml", ["model.lora={rank: 2, alpha: 4}"])
    model = config.model.model_copy(update={"policy": "/run/step/hf", "reference": config.model.policy})
    config = config.model_copy(update={"model": model})
    assert with_local_settings(config) == config


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.policy='ftp://me:secret@host/model'", "keep secrets out of the URL"),
        ("reward_model={path: 'ftp://me:secret@host/model'}", "keep secrets out of the URL"),
        ("model.init_from='s3://bucket/run'", "name it as model.policy, and what model.policy names now as model.ref"),
    ],
)
def test_urls_that_a_configuration_may_not_have(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(ROOT / "configs/tiny.yaml", [override])


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
