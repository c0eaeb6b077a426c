"""Learner steps of a run, executed again from its checkpoint and its ledger: is the loss the same?"""

import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pilaf_ray import build
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.launch import RoleLauncher, RoleResources
from pilaf_ray.config.algorithms import RolloutAlgorithm
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.errors import RunFolderError
from pilaf_ray.observability.logs import close_logging, setup_logging
from pilaf_ray.quantised_run import with_quantised_base
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.store.location import ledger_location
from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.types import LabeledPair


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedStep:
    """A step's loss then and now."""

    step: int
    recorded: float
    replayed: float


def replay(run: Path, *, step: int) -> list[ReplayedStep]:
    """Execute the steps after the newest checkpoint before ``step``, and ``step`` itself.

    The run folder is only read; without a checkpoint before ``step`` the start is the run's own.

    Raises:
        RunFolderError: the folder holds no such run or step.
    """
    if not (run / "config.json").is_file():
        raise RunFolderError(f"{run} is not a run folder: it has no config.json")
    # A base in the run's folder is where that is now.
    config = with_quantised_base(RunConfig.model_validate_json((run / "config.json").read_text()), run)
    recorded = {
        record["step"]: record["loss"]
        for record in (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    }
    if step not in recorded:
        raise RunFolderError(f"{run} has no step {step}: it has 1 to {max(recorded, default=0)}")
    if isinstance(config.algorithm, RolloutAlgorithm) or config.schedule.type != "online":
        raise RunFolderError(f"{run}: only steps of an online run on labelled pairs can be executed again")
    found = CheckpointStore(run / "checkpoints", keep_last=1, clean=False).latest(before=step)
    first = 1 if found is None else found[0] + 1
    location = ledger_location(run, url=config.store.url)
    reader = LedgerReader(location.url, namespace=location.namespace)
    try:
        batches = {number: reader.trained_at(number) for number in range(first, step + 1)}
    finally:
        reader.close()
    with tempfile.TemporaryDirectory(prefix="pilaf-replay-") as scratch:
        setup_logging("replay", Path(scratch))
        try:
            with ray_cluster(
                address=config.resources.address, num_cpus=config.resources.learner.cpus * config.learner.ranks
            ):
                losses = asyncio.run(_losses(config, batches, None if found is None else found[1], Path(scratch)))
        finally:
            close_logging()
    return [ReplayedStep(step=n, recorded=recorded[n], replayed=losses[n]) for n in batches]


async def _losses(
    config: RunConfig, batches: Mapping[int, Sequence[LabeledPair]], checkpoint: Path | None, scratch: Path
) -> dict[int, float]:
    inputs = build.build_inputs(config)
    learner, asked = config.learner, config.resources.learner
    launcher = RoleLauncher(logs=str(scratch), call_seconds=config.pipeline.call_seconds)
    group = await launcher.learner(
        build.learner_arguments(config, inputs, RunFolder(path=scratch, attempt=0)),
        {"transport": "filesystem", "folder": str(scratch / "weights")},
        ranks=learner.ranks,
        resources=RoleResources(num_cpus=asked.cpus, num_gpus=asked.gpus, threads=learner.cpu_threads),
    )
    if checkpoint is not None:
        await group.load((checkpoint / "learner").resolve())
    losses = {}
    for number, batch in batches.items():
        losses[number] = (await group.train_step(number, batch)).loss
    await group.close()
    return losses
