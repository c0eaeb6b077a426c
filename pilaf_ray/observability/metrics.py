"""What is measured: typed reductions over the keys of :mod:`pilaf_ray.observability.metric_table`, and its page.

``python -m pilaf_ray.observability.metrics > docs/metrics.md`` writes the table as a page.
"""

import math
import sys
from collections.abc import Iterable, Sequence

from pilaf_ray.observability.metric_table import METRICS
from pilaf_ray.observability.metric_types import Last, Max, Mean, Metric, MetricDefinition, Reduction, Sum

_DEFINITIONS = {definition.key: definition for definition in METRICS}


def definition_of(key: str) -> MetricDefinition:
    """The definition of ``key``; ValueError if there is none."""
    if key not in _DEFINITIONS:
        raise ValueError(f"metric {key!r} has no definition: add it to metric_table.py")
    return _DEFINITIONS[key]


def reduce_metrics(metrics: Iterable[Metric]) -> dict[str, float]:
    """One number a key, in order of first appearance.

    Raises:
        ValueError: a key that the table does not define, or a reduction other than the defined one.
    """
    grouped: dict[str, list[Reduction]] = {}
    for metric in metrics:
        expected = definition_of(metric.key).reduction
        if type(metric.value) is not expected:
            got = type(metric.value).__name__
            raise ValueError(f"metric {metric.key!r} is reduced by {expected.__name__}, not by {got}")
        grouped.setdefault(metric.key, []).append(metric.value)
    return {key: _reduce(values) for key, values in grouped.items()}


def _reduce(values: Sequence[Reduction]) -> float:
    numbers = [float(value.value) for value in values]
    match values[0]:
        case Mean():
            weights = [value.weight for value in values if isinstance(value, Mean)]
            total = sum(weights)
            if total == 0:
                return math.nan
            return sum(n * w for n, w in zip(numbers, weights, strict=True)) / total
        case Max():
            return max(numbers)
        case Sum():
            return math.fsum(numbers)
        case Last():
            return numbers[-1]


def metrics_page() -> str:
    """The table as a Markdown page."""
    lines = [
        "# Metrics",
        "",
        "Generated from `pilaf_ray/observability/metric_table.py`; do not edit by hand.",
        "",
        "`metrics.jsonl` holds one object a learner step: `step`, counted from 1, and these keys.",
        "Logarithms are natural; rewards are on the log-odds scale of the Bradley–Terry model.",
        "",
        "| key | unit | reduction | definition | healthy |",
        "|---|---|---|---|---|",
    ]
    for d in METRICS:
        cells = (f"`{d.key}`", d.unit, d.reduction.__name__.lower(), d.formula, d.healthy)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
