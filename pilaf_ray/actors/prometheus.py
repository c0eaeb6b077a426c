"""A run's figures for Prometheus, through Ray's own metrics; every node's agent serves them."""

import math
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from pilaf_ray.observability.exposed import ROLE_BUSY, ROLE_CALLS, STATE, STEP, exposed_name, exposed_names
from pilaf_ray.types import PairState


class PrometheusSink:
    """Sets one gauge a metric, with the run's name as a label.

    Args:
        run: the run's name.
    """

    def __init__(self, run: str) -> None:
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
