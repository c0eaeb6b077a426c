"""Results as JSON that every reader takes: what is not defined is null, never NaN or Infinity."""

import json
import math
from pathlib import Path
from typing import Any


def write_json(values: Any, path: Path) -> None:
    """Write plain data (see :func:`defined`) to ``path``; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(defined(values), indent=1, allow_nan=False) + "\n")


def defined(value: Any) -> Any:
    """``value`` with None in place of every number that is not finite, at any depth."""
    if isinstance(value, dict):
        return {key: defined(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [defined(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
