"""The estimated memory of each role beside the peaks that a finished run measured.

``python -m benchmarks.memory runs/NAME [runs/OTHER ...]``: run it where the run ran, with the model in place.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.memory import MIB
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
            sum(e.host_bytes_of(n) + e.device_bytes for n in range(replicas[e.role])) / MIB,
            measured[e.role],
        )
        for e in role_memory(config)
    ]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    table = Table("run", "role", "estimated MiB", "measured MiB", "error")
    for folder in parser.parse_args().runs:
        for run, role, estimated, measured in rows(folder):
            table.add_row(run, role, f"{estimated:.0f}", f"{measured:.0f}", f"{estimated / measured - 1:+.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
