"""A base of 4 bits: what it stands for, by hand; the same for everyone who computes with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from pilaf_ray.config.loader import load_config
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines import quantised
from pilaf_ray.engines.quantised import dequantised, load_quantised, require_bitsandbytes, write_base
from pilaf_ray.errors import ConfigError, ModelError
from pilaf_ray.quantised_run import model_fingerprint, require_same_start, with_quantised_base, write_run_base

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
QLORA = "model.lora={rank: 4, alpha: 8, quantise: nf4}"
# The 16 values of NF4, from the appendix of the QLoRA paper.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


def by_hand(weight: Tensor) -> Tensor:
    """Blocks of 64: the nearest of 16 multiples of the largest."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * scale).reshape(weight.shape)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("models")
    make_tiny_llama(folder / "policy", seed=0)
    write_base(str(folder / "policy"), folder / "base")
    return folder / "policy", folder / "base"


def test_the_base_is_what_its_four_bits_stand_for(models: tuple[Path, Path]) -> None:
    policy, base = (load_file(folder / "model.safetensors") for folder in models)
    assert policy.keys() == base.keys()
    for name, weight in policy.items():
        is_linear = "proj" in name
        torch.testing.assert_close(base[name], by_hand(weight) if is_linear else weight, atol=1e-6, rtol=0)
        assert torch.equal(base[name], weight) != is_linear
    assert "quantization_config" not in (models[1] / "config.json").read_text()
    assert (models[1] / "tokenizer.json").is_file()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_quantised_again_it_is_itself(models: tuple[Path, Path], stored: torch.dtype, tmp_path: Path) -> None:
    """The learner reads the base as all others do, and holds it in 4 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(models[1], dtype=stored)
    plain.save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(models[1]).save_pretrained(tmp_path / "stored")
    held = load_quantised(str(tmp_path / "stored"), compute_dtype=torch.float32)
    weights = dict(plain.float().named_parameters())
    for name, parameter in held.named_parameters():
        # Two roundings to bfloat16 of what is multiplied: the same of 16 values, of a scale that is 1/512 off.
        tolerance = 0.0 if stored is torch.float32 else 2**-7
        torch.testing.assert_close(dequantised(parameter), weights[name].detach(), atol=1e-8, rtol=tolerance)


def test_policy_and_reference_of_such_a_run_are_the_base(tmp_path: Path) -> None:
    config = with_quantised_base(load_config(TINY, [QLORA]), tmp_path / "run")
    assert config.model.policy == config.model.reference_path == str(tmp_path / "run" / "base")
    plain = load_config(TINY, ["model.lora={rank: 4, alpha: 8}"])
    assert with_quantised_base(plain, tmp_path / "run") is plain


def test_a_base_that_is_there_stays(models: tuple[Path, Path]) -> None:
    before = (models[1] / "model.safetensors").stat().st_mtime_ns
    write_base("nowhere", models[1])
    assert (models[1] / "model.safetensors").stat().st_mtime_ns == before


def resume(run: Path, start: Path) -> None:
    """What a run does before it loads anything."""
    config = with_quantised_base(load_config(TINY, [QLORA, f"model.policy={start}"]), run)
    require_same_start(config, start=str(start))
    write_run_base(config, start=str(start), console=Console(quiet=True))


@pytest.fixture
def run(models: tuple[Path, Path], tmp_path: Path) -> Path:
    """A run that has made its base."""
    (tmp_path / "run").mkdir()
    resume(tmp_path / "run", models[0])
    return tmp_path / "run"


def test_another_model_does_not_go_on_with_this_ones_base(run: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(ModelError) as refused:
        resume(run, other)
    assert str(refused.value) == (
        f"model.policy: '{other}' is not the model that this run's base of 4 bits was made of ('{models[0]}' then): "
        "put that one back, or start a new run"
    )
    # The base is written anew where a copy of the run is fetched to another machine, and must be the same.
    shutil.rmtree(run / "base")
    with pytest.raises(ModelError, match="is not the model that this run's base"):
        resume(run, other)
    resume(run, models[0])
    assert load_file(run / "base" / "model.safetensors").keys() == load_file(other / "model.safetensors").keys()


def test_a_run_that_moved_goes_on(run: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "elsewhere")
    before = (moved / "base" / "model.safetensors").stat().st_mtime_ns
    model = Path(shutil.copytree(models[0], tmp_path / "model, copied"))
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "transformers_version": "9.9"}))
    resume(moved, model)
    # With the base itself, as the configuration saved in the run's folder names it.
    resume(moved, moved / "base")
    assert (moved / "base" / "model.safetensors").stat().st_mtime_ns == before


def test_models_are_told_apart_by_settings_and_weights(models: tuple[Path, Path], tmp_path: Path) -> None:
    def fingerprint() -> str:
        return model_fingerprint(str(model))

    model = Path(shutil.copytree(models[0], tmp_path / "model"))
    same = model_fingerprint(str(models[0]))
    assert fingerprint() == same != model_fingerprint(str(models[1]))
    (model / "training_args.bin").write_bytes(b"no weights")
    assert fingerprint() == same
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "rms_norm_eps": 1e-3}))
    assert fingerprint() != same
    (model / "config.json").write_text(json.dumps(described))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert fingerprint() != same
    assert model_fingerprint("someone/model") != model_fingerprint("someone/other")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes: pip install 'pilaf-ray\[quantise\]'"):
        require_bitsandbytes()
