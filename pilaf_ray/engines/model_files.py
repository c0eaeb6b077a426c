"""Whether the weights in a model's folder are all there, told from the files' own tables of contents."""

import json
import struct
from pathlib import Path
from typing import Any

from pilaf_ray.errors import ModelError


def require_whole(folder: Path, *, name: str) -> None:
    """Return if every file that an index names is there, and no safetensors file is shorter than it says.

    Args:
        name: what the user calls the model.

    Raises:
        ModelError: in one line, what is missing or short.
    """
    # Where there are several kinds of weights, safetensors are what is loaded: an index of others may be a leftover.
    for index in sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json")):
        named = set(_json(index, name=name).get("weight_map", {}).values())
        missing = sorted(file for file in named if not (folder / file).is_file())
        if missing:
            raise ModelError(
                f"{name}: {missing[0]} is missing, of {len(named)} files that {index.name} names: upload it, or wait "
                "until its upload is done"
            )
    for file in sorted(folder.rglob("*.safetensors")):
        size, wanted = file.stat().st_size, _described_bytes(file)
        if wanted is None or size < wanted:
            has = f"{size} bytes" if wanted is None else f"{size} of {wanted} bytes"
            raise ModelError(f"{name}: {file.relative_to(folder)} is short, it has {has}: upload it again")


def _described_bytes(file: Path) -> int | None:
    """What the header of a safetensors file says that there is; None where the header is not whole."""
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return None
        (length,) = struct.unpack("<Q", start)
        if 8 + length > file.stat().st_size:
            return None
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            return None
    ends = (tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__")
    return 8 + int(length) + max(ends, default=0)


def _json(file: Path, *, name: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{name}: {file.name} is no JSON ({error}): upload it again") from error
    return values
