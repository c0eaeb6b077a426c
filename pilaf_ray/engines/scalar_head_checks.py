"""What a model with a scalar head is refused for, before anything heavy starts."""

from typing import Any

from pilaf_ray.errors import ConfigError, ModelError


def check_scalar_head(path: str, *, setting: str, layers: int | None, trainable_layers: int | None) -> None:
    """Look at a model's configuration only.

    Args:
        path: a language model or a reward model: folder or hub id.
        setting: the section of the configuration that names it, e.g. ``"reward_model"``.
        layers: how many of the first layers are kept; None for all.
        trainable_layers: how many of the last layers are to be trained; None for all.

    Raises:
        ModelError: there is no model, or it has several outputs.
        ConfigError: more layers are to be kept or trained than there are.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{setting}.path: cannot read '{path}': {str(error).splitlines()[0]}") from error
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ModelError(
            f"{setting}.path: '{path}' has {config.num_labels} outputs; a reward model has 1: name another model"
        )
    count = config.get_text_config().num_hidden_layers
    if layers is not None and layers > count:
        raise ConfigError(f"{setting}.layers = {layers}, but '{path}' has {count} layers: lower it")
    count = layers or count
    if trainable_layers is not None and trainable_layers > count:
        raise ConfigError(f"{setting}.trainable_layers = {trainable_layers}, but '{path}' has {count} layers: lower it")
