"""A generator refuses, before any engine starts, what cannot work."""

import json
from pathlib import Path
from typing import Any

import pytest

from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.speculation_settings import Speculation
from pilaf_ray.errors import ConfigError, ModelError

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64, "eos_token_id": 2}


def folder(path: Path, **changes: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 256, **changes}))
    return str(path)


def make(policy: str, reference: str, **changes: Any) -> Generator:
    arguments = {"dtype": "float32", "max_model_len": 128, "max_new_tokens": 64, **changes}
    return Generator(policy_path=policy, reference_path=reference, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 500, "hidden_size": 32},
            r"differ in hidden_size, vocab_size \(e.g. vocab_size: 512 and 500",
        ),
        ({"architectures": ["Qwen2ForCausalLM"]}, "differ in architectures"),
    ],
)
def test_models_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(folder(tmp_path / "p"), folder(tmp_path / "r", **changes))


def test_harmless_differences_pass(tmp_path: Path) -> None:
    make(folder(tmp_path / "p"), folder(tmp_path / "r", eos_token_id=[2, 3], transformers_version="5"))


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere is not a model folder"):
        make(str(tmp_path / "nowhere"), folder(tmp_path / "r"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 512}, "max_model_len=512 exceeds the 256 positions"),
        ({"max_new_tokens": 128}, "leaves no room for a prompt beside max_new_tokens=128"),
        (
            {"speculation": Speculation(), "tensor_parallel_size": 2},
            "speculation works with one worker, not with generation.tensor_parallel_size = 2",
        ),
        ({"speculation": Speculation(), "enforce_eager": False}, "speculation needs generation.enforce_eager"),
        ({"speculation": Speculation(tokens=0)}, "speculation.tokens = 0 must be at least 1"),
    ],
)
def test_limits_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(folder(tmp_path / "p"), folder(tmp_path / "r"), **changes)
