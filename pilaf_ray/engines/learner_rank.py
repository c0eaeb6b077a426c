"""A process of a learner's group."""

import os
from pathlib import Path

import torch

from pilaf_ray.engines.build_locks import clear_dead_locks, extensions_folder
from pilaf_ray.engines.core_share import CoreShare
from pilaf_ray.observability.usage import UsageClock
from pilaf_ray.threads import Threads
from pilaf_ray.types import RoleUsage


class LearnerRank:
    """What the ranks of all learners have in common; made before DeepSpeed is imported.

    Args:
        role: for reports of time and memory, e.g. ``learner``.
        rank: of ``world_size``, from 0.
        master_addr: where the ranks meet, with ``master_port``.
        cpu_threads: of PyTorch in this process; ``auto``: as many as other processes leave.
        seed: of PyTorch in this process.
        dump_folder: for batches that gave a loss or a gradient which is not finite.
    """

    def __init__(
        self,
        role: str,
        *,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        cpu_threads: Threads = 1,
        seed: int = 0,
        dump_folder: Path,
    ) -> None:
        self._cores = CoreShare(cpu_threads)
        torch.manual_seed(seed)
        # DeepSpeed builds or loads an operator while it joins.
        clear_dead_locks(extensions_folder())
        _join_group(rank=rank, world_size=world_size, master_addr=master_addr, master_port=master_port)
        self._rank, self._world_size = rank, world_size
        self._dump_folder = dump_folder
        self._clock = UsageClock(f"{role}-{rank}")

    def usage(self) -> RoleUsage:
        """Busy time and peak memory."""
        return self._clock.usage()


def _join_group(*, rank: int, world_size: int, master_addr: str, master_port: int) -> None:
    """Set the rendezvous and pick the accelerator, before DeepSpeed is imported.

    All five variables are needed, or DeepSpeed goes looking for MPI. LOCAL_RANK is 0
    because Ray shows each actor its own devices only; LOCAL_SIZE stays unset, or
    DeepSpeed would use a shared-memory collective that waits without a time-out.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
    )
    os.environ.pop("LOCAL_SIZE", None)
    os.environ.setdefault("DEEPSPEED_TIMEOUT", "3")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
