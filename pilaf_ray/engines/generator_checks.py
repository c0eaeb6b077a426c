"""What a generator refuses before it starts an engine."""

import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

from pilaf_ray.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pilaf_ray.engines.speculation_settings import Speculation

PLUGIN_NAME = "pilaf_ray"
FREE_CONFIG_KEYS = frozenset(
    {"_commit_hash", "_name_or_path", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id"}
    | {"torch_dtype", "transformers_version", "use_cache"}
)
"""Entries of config.json in which policy and reference may differ."""


def check_lengths(*, max_model_len: int, max_new_tokens: int) -> None:
    """Raise ConfigError where responses leave no room for a prompt."""
    if not 0 < max_new_tokens < max_model_len:
        raise ConfigError(
            f"max_model_len={max_model_len} leaves no room for a prompt beside "
            f"max_new_tokens={max_new_tokens}: raise the first or lower the second"
        )


def check_speculation(speculation: "Speculation | None", *, tensor_parallel_size: int, enforce_eager: bool) -> None:
    """Raise ConfigError where an engine of this kind cannot draft ahead."""
    if speculation is None:
        return
    if speculation.tokens < 1:
        raise ConfigError(f"generation.speculation.tokens = {speculation.tokens} must be at least 1")
    if tensor_parallel_size > 1:
        raise ConfigError(
            f"generation.speculation works with one worker, not with generation.tensor_parallel_size = "
            f"{tensor_parallel_size}: leave one of the two out"
        )
    if not enforce_eager:
        raise ConfigError("generation.speculation needs generation.enforce_eager: leave one of the two out")


def check_models(policy_path: str, reference_path: str, *, max_model_len: int) -> str:
    """The architecture that both folders share.

    Raises:
        ModelError: a folder is no model, or the two differ in architecture or size.
        ConfigError: ``max_model_len`` exceeds what the model was built for.
    """
    policy, reference = _read_config(policy_path), _read_config(reference_path)
    keys = (policy.keys() | reference.keys()) - FREE_CONFIG_KEYS
    different = sorted(key for key in keys if policy.get(key) != reference.get(key))
    if "architectures" in different:
        # Every other entry has another name or meaning there: what differs first says it all.
        different = ["architectures"]
    if different:
        first = "vocab_size" if "vocab_size" in different else different[0]
        raise ModelError(
            f"policy {policy_path} and reference {reference_path} must be the same kind of model, "
            f"but differ in {', '.join(different)} "
            f"(e.g. {first}: {policy.get(first)} and {reference.get(first)})"
        )
    limit = policy.get("max_position_embeddings", policy.get("n_positions", max_model_len))
    if max_model_len > limit:
        raise ConfigError(f"max_model_len={max_model_len} exceeds the {limit} positions of {policy_path}")
    architectures = policy.get("architectures") or []
    if len(architectures) != 1:
        raise ModelError(f"config.json in {policy_path} must name one architecture, not {architectures}")
    return str(architectures[0])


def _read_config(path: str) -> dict[str, Any]:
    """config.json of a folder or hub id, as it stands."""
    from transformers import PretrainedConfig

    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path} is not a model folder or a hub id: cannot read config.json ({reason})") from error
    if not config:
        raise ModelError(f"{path} is not a model folder: it has no config.json")
    return config


def check_tokenizers(policy_path: str, reference_path: str) -> None:
    """Raise ModelError where the same token id means different things to the two models."""
    if policy_path == reference_path:
        return
    from transformers import AutoTokenizer

    policy: Any = AutoTokenizer.from_pretrained(policy_path)
    reference: Any = AutoTokenizer.from_pretrained(reference_path)
    words, others = policy.get_vocab(), reference.get_vocab()
    different = [word for word in words.keys() | others.keys() if words.get(word) != others.get(word)]
    if different:
        word = min(different)
        raise ModelError(
            f"policy {policy_path} and reference {reference_path} have different vocabularies "
            f"({len(different)} tokens, e.g. {word!r}: {words.get(word)} and {others.get(word)}): "
            "mixing their logits would mix unlike tokens; "
            "name a reference with the policy's tokenizer"
        )


def check_plugin() -> None:
    """vLLM's processes find the model class by the entry point of the installed package.

    Raises:
        ConfigError: the package is not installed, or its plug-in is shut out.
    """
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if PLUGIN_NAME not in plugins.names:
        raise ConfigError("vLLM cannot find this package's plug-in: install the package (pip install -e .)")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise ConfigError(f"VLLM_PLUGINS={allowed!r} shuts out the plug-in {PLUGIN_NAME!r}: add it, or unset it")
