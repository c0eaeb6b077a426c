"""A run whose learner holds its base in 4 bits: policy and reference are what those stand for."""

import hashlib
import json
from pathlib import Path

from rich.console import Console

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.model_store import local_model
from pilaf_ray.engines.quantised import BASE, write_base
from pilaf_ray.errors import ModelError

RECORD = "base.json"
"""In a run's folder, and in copies of it: which model its base was made of."""
SAMPLES, SAMPLE_BYTES = 256, 4096
"""Read of each file of weights: training moves every number of a model, so a look here and there tells two apart."""
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def with_quantised_base(config: RunConfig, run_folder: Path) -> RunConfig:
    """Policy and reference as the base that the run writes, where the learner holds it in 4 bits."""
    model = config.model
    if model.lora is None or model.lora.quantise is None:
        return config
    base = str((run_folder / BASE).resolve())
    return config.model_copy(update={"model": model.model_copy(update={"policy": base, "reference": base})})


def require_same_start(config: RunConfig, *, start: str) -> None:
    """Raises ModelError where the run that is resumed made its base of another model than the one at ``start``.

    The folders of the model and of the run may have moved meanwhile: what is compared is in the files.
    """
    base = Path(config.model.policy)
    record = base.parent / RECORD
    if _is_plain(config, start) or not record.is_file():
        return
    before = json.loads(record.read_text())
    if before["fingerprint"] != model_fingerprint(local_model(start)):
        raise ModelError(
            f"model.policy: '{start}' is not the model that this run's base of 4 bits was made of ('{before['path']}' "
            "then): put that one back, or start a new run"
        )


def write_run_base(config: RunConfig, *, start: str, console: Console) -> None:
    """Make the base that ``config`` names, if it does, out of the model at ``start``, and write down which that is.

    Raises:
        ModelError: that cannot be loaded.
    """
    if _is_plain(config, start):
        return
    base, source = Path(config.model.policy), local_model(start)
    if not (base / "config.json").is_file():
        console.print(f"quantising {start}: every role starts from what its 4 bits stand for", markup=False)
        write_base(source, base)
    if not (base.parent / RECORD).is_file():
        (base.parent / RECORD).write_text(json.dumps({"path": start, "fingerprint": model_fingerprint(source)}))


def _is_plain(config: RunConfig, start: str) -> bool:
    """Whether the policy is the model at ``start`` itself, as that of a base is that a run is resumed with."""
    return config.model.policy in (start, str(Path(start).resolve()))


def model_fingerprint(path: str) -> str:
    """What tells models apart: the configuration and samples of the weights of a folder, the name of one on a hub."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    settings = json.loads((folder / "config.json").read_text())
    # Who saved it is no part of a model.
    for name in ("transformers_version", "_name_or_path"):
        settings.pop(name, None)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    found = (sorted(folder.glob(pattern)) for pattern in _WEIGHTS)
    for file in next((files for files in found if files), []):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(sample * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
