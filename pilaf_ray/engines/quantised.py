"""Adapters on a base of 4 bits (QLoRA): what the base is, for everyone who computes with it.

NF4 keeps each weight as one of 16 multiples of the largest of its block of 64. What adapters are trained on is thus not
the model of ``model.policy`` but what those numbers stand for. A run writes that down once, as an ordinary model
(:func:`write_base`), which generators, reference and reports read; the learner quantises it again, which gives
the same numbers, because the largest of a block is one of them. bitsandbytes does the arithmetic.
"""

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilaf_ray.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

BASE = "base"
"""In a run's folder: the model that the adapters are trained on."""


def require_bitsandbytes() -> None:
    """Raises ConfigError where the package that holds weights in 4 bits is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.lora.quantise: nf4 needs the package bitsandbytes: pip install 'pilaf-ray[quantise]', or leave "
            "model.lora.quantise out"
        )


def load_quantised(path: str, *, compute_dtype: "torch.dtype") -> "nn.Module":
    """The model at ``path`` with every linear layer below the head in NF4, the rest in fp32; on the host.

    Raises:
        ConfigError: bitsandbytes is missing.
        ModelError: the model cannot be loaded.
    """
    require_bitsandbytes()
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        # Scales that are quantised themselves would change when the base is quantised again.
        bnb_4bit_use_double_quant=False,
    )
    try:
        network: nn.Module = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=settings
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.policy: cannot quantise '{path}': {str(error).splitlines()[0]}") from error
    return network


def forget_quantiser(network: "nn.Module") -> None:
    """Let ``network`` be saved as the ordinary model that its dequantised weights make."""
    model: Any = network
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = model.is_loaded_in_4bit = False


def dequantised(parameter: "nn.Parameter") -> "Tensor":
    """The numbers that a parameter stands for: its own, or those that its 4 bits mean, in its layer's shape."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(parameter.data, state)
    return weight


def write_base(path: str, folder: Path) -> None:
    """Write what adapters of the model at ``path`` are trained on to ``folder``; an earlier base there stays.

    The number format is that of the model's own files, so the base takes as much room as they do.

    Raises:
        ConfigError: bitsandbytes is missing.
        ModelError: the model cannot be loaded.
    """
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import AutoConfig, AutoTokenizer

    dtype = getattr(AutoConfig.from_pretrained(path), "dtype", None) or torch.float32
    network: Any = load_quantised(path, compute_dtype=torch.float32)
    weights = {name: dequantised(parameter).to(dtype) for name, parameter in network.named_parameters()}
    forget_quantiser(network)
    network.config.dtype = dtype
    scratch = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    network.save_pretrained(scratch, state_dict=weights)
    AutoTokenizer.from_pretrained(path).save_pretrained(scratch)
    scratch.rename(folder)
    logger.info("wrote the dequantised base of %s to %s", path, folder)
