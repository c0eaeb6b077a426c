"""A model folder as a version of the weights: a running engine takes it over in place of a start of its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilaf_ray.engines.weight_tickets import MODEL_FOLDER, SampleChecksum, WeightUpdate
from pilaf_ray.errors import WeightSyncError

if TYPE_CHECKING:
    from torch import Tensor

ENDS = (("config.json", "eos_token_id"), ("generation_config.json", "eos_token_id"))
"""What says where a response ends; an engine reads it once."""


def can_take_over(serving: Path, wanted: Path) -> bool:
    """Whether an engine that was started with ``serving`` can be given the weights of ``wanted``.

    Both are of one network, as :func:`pilaf_ray.engines.generator_checks.check_models` sees to. ``wanted`` must end
    its responses with the same tokens, and have its weights in safetensors.
    """
    same_ends = all(_json(serving / file).get(key) == _json(wanted / file).get(key) for file, key in ENDS)
    return same_ends and "quantization_config" not in _json(wanted / "config.json") and bool(_files(wanted))


def saved_policy(folder: Path, *, version: int) -> WeightUpdate:
    """The ticket of a Hugging Face ``folder``; the folder must stay as it is, where engines see it too.

    Raises:
        WeightSyncError: it cannot be read.
    """
    checksum = SampleChecksum()
    for name, tensor in _tensors(folder):
        checksum.add(name, tensor)
    return checksum.ticket(version=version, transport=MODEL_FOLDER, location=str(folder), adapter_scale=None)


def read_model(location: str) -> list[tuple[str, "Tensor"]]:
    """The tensors of a ticket's ``location``, in the order of :func:`saved_policy`.

    Raises:
        WeightSyncError: they cannot be read.
    """
    return list(_tensors(Path(location)))


def _tensors(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    from safetensors import SafetensorError, safe_open

    try:
        for file in _files(folder):
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in sorted(tensors.keys()):
                    yield name, tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(f"cannot read the weights in {folder}: {error}") from error


def _files(folder: Path) -> list[Path]:
    """What transformers would load; a folder may hold the same weights in other layouts, or adapters, beside it."""
    indexed: dict[str, str] = _json(folder / "model.safetensors.index.json").get("weight_map", {})
    names = sorted(set(indexed.values())) or ["model.safetensors"]
    return [folder / name for name in names if (folder / name).is_file()]


def _json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return values
