"""From what a user names to the model folder that holds the policy."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilaf_ray.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyFolder:
    """A policy on disk, and the run that it came from, where it is known."""

    name: str
    model: Path
    """Hugging Face folder."""
    step: int
    """Optimiser steps taken; 0 where unknown."""
    run: Path | None

    @property
    def run_config(self) -> Path | None:
        """The configuration of the run that made it."""
        return self.run / "config.json" if self.run is not None else None


def find_policy(path: Path) -> PolicyFolder:
    """Resolve a run folder (its newest checkpoint), a checkpoint ``step-000010`` of one, or a model folder.

    Raises:
        CheckpointError: it is none of them, or has no weights or no tokenizer.
    """
    path = path.resolve()
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder; give a run, a checkpoint of a run or a model folder")
    if _is_run(path):
        steps = sorted((path / "checkpoints").glob("step-*"))
        if not steps:
            raise CheckpointError(f"{path} has no checkpoint yet; wait for the first or lower checkpoint.every_steps")
        return find_policy(steps[-1])
    model = path / "learner" / "hf" if (path / "learner" / "hf").is_dir() else path
    if "model_type" not in _json(model / "config.json"):
        raise CheckpointError(f"{path} is neither a run, a checkpoint of a run nor a Hugging Face model folder")
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{model} has no tokenizer: copy the tokenizer files of the model it was trained from")
    run = next((parent for parent in model.parents if _is_run(parent)), None)
    folder = next((p.name for p in (model, *model.parents) if p.name.startswith("step-")), "")
    return PolicyFolder(
        name=f"{run.name}/{folder}" if run is not None and folder else path.name,
        model=model,
        step=int(folder.removeprefix("step-")) if folder.removeprefix("step-").isdigit() else 0,
        run=run,
    )


def _is_run(path: Path) -> bool:
    return "run" in _json(path / "config.json")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
