"""A run's figures for Prometheus, through Ray's own metrics; the agent of the controller's node serves them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge

from pilaf_ray.observability.exposed import ROLE_BUSY, ROLE_CALLS, STATE, STEP, exposed_name, exposed_names
from pilaf_ray.types import PairState

TARGETS = ".prometheus"
"""Folder beside run folders: a file for each run, because Prometheus takes a * in the last part only."""


class PrometheusSink:
    """Sets one gauge a metric, with the run's name as a label.

    Ray writes down where its agents serve only beside its dashboard, which a private cluster goes without. So the
    run says so itself, in the form that Prometheus's ``file_sd_configs`` read.

    Args:
        run: the run's name.
        runs: folder of all runs; its ``.prometheus/RUN.json`` is there until :meth:`close`.
    """

    def __init__(self, run: str, runs: Path) -> None:
        self._targets = runs / TARGETS / f"{run}.json"
        self._targets.parent.mkdir(exist_ok=True)
        partial = self._targets.with_suffix(".tmp")
        partial.write_text(json.dumps([{"targets": [served_at()]}]) + "\n")
        # At once: Prometheus may be reading.
        partial.replace(self._targets)
        self._run = run
        tags = {STATE: ("run", "state"), ROLE_CALLS: ("run", "role"), ROLE_BUSY: ("run", "role")}
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=tags.get(name, ("run",)))
            for name, text in exposed_names().items()
        }

    def write(self, record: Mapping[str, Any]) -> None:
        """One object of metrics.jsonl."""
        for key, value in record.items():
            gauge = self._gauges.get(STEP if key == "step" else exposed_name(key))
            if gauge is not None and isinstance(value, int | float) and math.isfinite(value):
                gauge.set(float(value), tags={"run": self._run})

    def write_roles(self, roles: Mapping[str, tuple[int, float]]) -> None:
        """Calls under way and busy share of each role."""
        for role, (calls, busy) in roles.items():
            self._gauges[ROLE_CALLS].set(float(calls), tags={"run": self._run, "role": role})
            self._gauges[ROLE_BUSY].set(busy, tags={"run": self._run, "role": role})

    def write_counts(self, counts: Mapping[PairState, int]) -> None:
        """Pairs of the ledger by state."""
        for state, count in counts.items():
            self._gauges[STATE].set(float(count), tags={"run": self._run, "state": state.value})

    def close(self) -> None:
        """Nothing is served any more; a second call does nothing."""
        self._targets.unlink(missing_ok=True)


def served_at() -> str:
    """Host and port of the agent that serves what this process exposes."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    host = node["NodeManagerAddress"]
    return f"[{host}]:{node['MetricsExportPort']}" if ":" in host else f"{host}:{node['MetricsExportPort']}"
