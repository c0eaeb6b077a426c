"""Reward and value models that cannot work are refused in one line, from their configuration alone."""

from pathlib import Path

import pytest

from pilaf_ray.engines.scalar_head_checks import check_scalar_head
from pilaf_ray.errors import ConfigError, ModelError

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(num_hidden_layers=3, hidden_size=8, num_attention_heads=2, vocab_size=16)
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_language_model_and_as_many_layers_as_there_are_pass(folder: Path) -> None:
    for layers in (None, 0, 3):
        check_scalar_head(str(folder), setting="reward_model", layers=None, trainable_layers=layers)


def test_more_layers_than_there_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm.value.trainable_layers = 4, but .* has 3 layers: lower it"):
        check_scalar_head(str(folder), setting="algorithm.value", layers=None, trainable_layers=4)


def test_of_fewer_layers_fewer_can_be_trained(folder: Path) -> None:
    check_scalar_head(str(folder), setting="reward_model", layers=2, trainable_layers=2)
    with pytest.raises(ConfigError, match=r"reward_model.layers = 4, but .* has 3 layers: lower it"):
        check_scalar_head(str(folder), setting="reward_model", layers=4, trainable_layers=None)
    with pytest.raises(ConfigError, match=r"reward_model.trainable_layers = 3, but .* has 2 layers: lower it"):
        check_scalar_head(str(folder), setting="reward_model", layers=2, trainable_layers=3)


def test_several_outputs(folder: Path) -> None:
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.architectures, config.num_labels = ["LlamaForSequenceClassification"], 2
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"reward_model.path: .* has 2 outputs; a reward model has 1"):
        check_scalar_head(str(folder), setting="reward_model", layers=None, trainable_layers=None)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reward_model.path: cannot read") as caught:
        check_scalar_head(str(tmp_path / "nowhere"), setting="reward_model", layers=None, trainable_layers=None)
    assert "\n" not in str(caught.value)
