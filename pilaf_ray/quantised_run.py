"""A run whose learner holds its base in 4 bits: policy and reference are what those stand for."""

from pathlib import Path

from rich.console import Console

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.quantised import BASE, write_base


def with_quantised_base(config: RunConfig, run_folder: Path) -> RunConfig:
    """Policy and reference as the base that the run writes, where the learner holds it in 4 bits."""
    model = config.model
    if model.lora is None or model.lora.quantise is None:
        return config
    base = str((run_folder / BASE).resolve())
    return config.model_copy(update={"model": model.model_copy(update={"policy": base, "reference": base})})


def write_run_base(config: RunConfig, *, start: str, console: Console) -> None:
    """Make the base that ``config`` names, if it does, out of the model at ``start``.

    Raises:
        ModelError: that cannot be loaded.
    """
    if config.model.policy != start:
        console.print(f"quantising {start}: every role starts from what its 4 bits stand for", markup=False)
        write_base(start, Path(config.model.policy))
