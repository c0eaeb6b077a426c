"""Loading a learner's checkpoint into another number of ranks than wrote it.

DeepSpeed's own files hold each rank's part of the optimiser's state. Its universal form holds whole tensors
by parameter name, which any number of ranks can take its part of. It is made when it is needed, so that
checkpoints that are never loaded so cost nothing.
"""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from pilaf_ray.errors import CheckpointError

TAG = "deepspeed"
"""Folder of DeepSpeed's own files in a learner's part of a checkpoint."""
_PATIENCE = timedelta(hours=2)
"""Converting a large model takes longer than collectives may."""


def rng_file(folder: Path, rank: int) -> Path:
    """Where ``rank`` keeps the state of its random numbers."""
    return folder / f"rng-{rank}.pt"


def saved_ranks(folder: Path) -> int:
    """How many ranks wrote a learner's part of a checkpoint."""
    return len(list(folder.glob("rng-*.pt")))


@contextlib.contextmanager
def universal_form(folder: Path, *, rank: int, world_size: int) -> Iterator[tuple[Path, str]]:
    """(folder, tag) of the checkpoint in ``folder`` for DeepSpeed to load, while the block runs; on all ranks.

    It takes as much room as DeepSpeed's files, beside them, where all ranks can read it.

    Raises:
        CheckpointError: on every rank, where rank 0 cannot convert it.
    """
    scratch = folder / "universal"
    refusal = [""]
    if rank == 0:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(scratch)
        try:
            _convert(folder / TAG, scratch / TAG)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            # DeepSpeed asserts where it meets something that it cannot convert.
            refusal = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    try:
        if world_size > 1:
            patient = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
            torch.distributed.broadcast_object_list(refusal, src=0, group=patient)
        if refusal[0]:
            raise CheckpointError(
                f"{folder}: written by {saved_ranks(folder)} ranks, it cannot be loaded into {world_size} "
                f"({refusal[0]}); make room, or set the number of ranks back"
            )
        yield scratch, TAG
        if world_size > 1:
            torch.distributed.barrier()
    finally:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # DeepSpeed's own note on the layout, which engines without tensor parallelism do not write.
        inject_missing_state=True,
    )
    # It prints, and draws a bar for every file.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(arguments)


@contextlib.contextmanager
def loading_universal(engine: Any) -> Iterator[None]:
    """DeepSpeed's ``engine`` loads the universal form while the block runs, and its own before and after."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    for state in engine.optimizer.optimizer.state.values():
        # Under ZeRO-3 DeepSpeed gives all groups one and the same tensor, which each of them then counts up.
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
