"""The estimated memory of each role beside the peaks that a finished run measured.

``python -m benchmarks.memory runs/NAME [runs/OTHER ...]``: run it where the run ran, with the model in place. With
``--within 0.15`` the exit code is 1 where an estimate is farther than that from its peak.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.shared_weights import TRANSPORT
from pilaf_ray.memory import MIB, MemoryEstimate
from pilaf_ray.resource_plan import role_memory

Row = tuple[str, str, float, float]


def rows(folder: Path) -> list[Row]:
    """(run, role, estimated MiB, measured MiB), all replicas of a role together."""
    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    measured = json.loads((folder / "report" / "summary.json").read_text())["peak_memory_mib"]
    replicas = {
        "generator": config.generation.replicas,
        "learner": config.learner.ranks,
        "reference": config.reference.replicas,
        "oracle": config.scoring_oracle.replicas,
        "reward": config.reward_model.ranks if config.reward_model else 0,
    }
    return [
        (
            *(folder.name, e.role),
            sum(_resident(e, n, shared=config.weights.transport == TRANSPORT) for n in range(replicas[e.role])) / MIB,
            measured[e.role],
        )
        for e in role_memory(config)
    ]


def _resident(estimate: MemoryEstimate, replica: int, *, shared: bool) -> float:
    """Without weights that are shared: the kernel counts them for the machine, not for the process that wrote them."""
    unmapped = sum(size for name, size in estimate.host if name == "weights to send" and shared and replica == 0)
    return estimate.host_bytes_of(replica) + estimate.device_bytes - unmapped


def error_of(row: Row) -> float:
    """How far the estimate lies above the measured peak, as a share of the latter."""
    _, _, estimated, measured = row
    return estimated / measured - 1


def main(arguments: Sequence[str] | None = None, *, read: Callable[[Path], Sequence[Row]] = rows) -> int:
    """Print one table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--within", type=float, help="largest error that is none, e.g. 0.15")
    options = parser.parse_args(arguments)
    found = [row for folder in options.runs for row in read(folder)]
    table = Table("run", "role", "estimated MiB", "measured MiB", "error")
    for row in found:
        run, role, estimated, measured = row
        table.add_row(run, role, f"{estimated:.0f}", f"{measured:.0f}", f"{error_of(row):+.1%}")
    Console().print(table)
    return int(options.within is not None and any(abs(error_of(row)) > options.within for row in found))


if __name__ == "__main__":
    sys.exit(main())
