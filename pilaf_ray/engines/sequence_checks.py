"""What of a model cannot be parted along the sequence, from its configuration alone."""

from typing import Any

from pilaf_ray.errors import ModelError


def check_sequence_parallel(path: str, *, ranks: int) -> None:
    """Look at the configuration of the model in ``path``: folder or hub id.

    Raises:
        ModelError: its heads cannot be dealt out to ``ranks`` ranks, or a layer does not attend to all before it.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError) as error:
        raise ModelError(f"model.policy: cannot read '{path}': {str(error).splitlines()[0]}") from error
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    setting = f"learner.sequence_parallel = {ranks}"
    if heads % ranks or (shared % ranks and ranks % shared):
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
        raise ModelError(
            f"{setting} does not divide the {heads} heads ({shared} of keys and values) of {path}: set it to one of "
            f"{', '.join(map(str, fits))}"
        )
    if not attends_to_all(config):
        raise ModelError(
            f"{setting}: {path} has layers with a sliding window or without attention, which are not parted: set "
            "learner.sequence_parallel: 1"
        )


def attends_to_all(config: Any) -> bool:
    """Whether every layer of a text configuration is plain attention to everything before."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return layers == {"full_attention"} and not window and not getattr(config, "alibi", False)
