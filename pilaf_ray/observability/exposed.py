"""Names under which a run's figures leave for Prometheus, and the Grafana dashboard made of them.

``python -m pilaf_ray.observability.exposed > launch/grafana/dashboards/pilaf.json`` writes the dashboard.
"""

import json
import re
import sys
from typing import Any

from pilaf_ray.observability.metric_table import METRICS

PREFIX = "ray_"
"""What Ray puts before every name."""
STATE, ROLE_CALLS, ROLE_BUSY, STEP = "pilaf_pairs", "pilaf_role_calls", "pilaf_role_busy", "pilaf_step"
FIXED = {
    STEP: "finished optimiser steps",
    STATE: "pairs of the ledger by state",
    ROLE_CALLS: "calls under way at a role",
    ROLE_BUSY: "share of the training time with a call under way at a role, in [0, 1]",
}


def exposed_name(key: str) -> str:
    """The name of a key of metrics.jsonl, before Ray's prefix."""
    return "pilaf_" + re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_")


def exposed_names() -> dict[str, str]:
    """Every exposed name, before Ray's prefix, and its help text with the unit."""
    # Ray takes ASCII only, which the formulas are not.
    defined = {exposed_name(d.key): f"{d.key} in {d.unit or 'no unit'}; defined in docs/metrics.md" for d in METRICS}
    return FIXED | defined


def dashboard() -> dict[str, Any]:
    """A Grafana dashboard over every exposed name; data source and run are chosen at the top of it."""
    panels: list[dict[str, Any]] = []
    _add(panels, "Step", f"max by (run) ({_query(STEP)})", "", kind="stat")
    _add(panels, "Pairs by state", f"max by (run, state) ({_query(STATE)})", "{{state}}")
    _add(panels, "Busy share of each role", f"max by (run, role) ({_query(ROLE_BUSY)})", "{{role}}", unit="percentunit")
    _add(panels, "Calls under way", f"max by (run, role) ({_query(ROLE_CALLS)})", "{{role}}")
    for d in METRICS:
        # A restarted driver is a new series of the same run: the newest one counts.
        expression = f"max by (run) ({_query(exposed_name(d.key))})"
        text = f"{d.formula}. Healthy: {d.healthy}."
        _add(
            panels,
            d.key,
            expression,
            "{{run}}",
            unit={"s": "s", "share": "percentunit"}.get(d.unit, "short"),
            text=text,
        )
    return {
        "uid": "pilaf-ray",
        "title": "pilaf_ray",
        "tags": ["pilaf-ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                {
                    "name": "run", "type": "query", "label": "Run", "includeAll": True, "multi": True, "refresh": 2,
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": {"query": f"label_values({PREFIX}{STEP}, run)", "refId": "run"},
                },
            ]
        },
        "panels": panels,
    }  # fmt: skip


def _query(name: str) -> str:
    return f'{PREFIX}{name}{{run=~"$run"}}'


def _add(
    panels: list[dict[str, Any]], title: str, expression: str, legend: str, *, unit: str = "short",
    kind: str = "timeseries", text: str = "",
) -> None:  # fmt: skip
    number = len(panels)
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels.append(
        {
            "id": number + 1,
            "title": title,
            "description": text,
            "type": kind,
            "datasource": source,
            "gridPos": {"x": number % 3 * 8, "y": number // 3 * 8, "w": 8, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [{"refId": "A", "expr": expression, "legendFormat": legend, "datasource": source}],
        }
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=1) + "\n")
