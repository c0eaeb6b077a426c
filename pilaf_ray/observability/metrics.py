"""What is measured: typed reductions, and the one table that defines every key.

``python -m pilaf_ray.observability.metrics > docs/metrics.md`` writes the table as a page.
"""

import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mean:
    """Weighted mean of the values of one key; ``weight`` is the number of items behind the value."""

    value: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Max:
    """Largest value of one key."""

    value: float


@dataclass(frozen=True, slots=True)
class Sum:
    """Total of the values of one key."""

    value: float


@dataclass(frozen=True, slots=True)
class Last:
    """The newest value of one key."""

    value: float


Reduction = Mean | Max | Sum | Last


@dataclass(frozen=True, slots=True)
class Metric:
    """One observation of ``key``; how it combines with others is part of the value.

    Example: ``Metric("data/reward", Mean(0.4, weight=16))``
    """

    key: str
    value: Reduction


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """What a key means. ``{name}`` in a key stands for any one name."""

    key: str
    reduction: type[Reduction]
    unit: str
    formula: str
    healthy: str


METRICS: tuple[MetricDefinition, ...] = (
    MetricDefinition(
        "learner/loss",
        Mean,
        "nats",
        "mean over the batch's pairs of the preference loss",
        "starts at log 2 ≈ 0.693 for `dpo` when policy and reference are equal; falls slowly",
    ),
    MetricDefinition(
        "learner/margin",
        Mean,
        "nats",
        "β·[(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)]",
        "starts at 0; rises",
    ),
    MetricDefinition(
        "learner/accuracy",
        Mean,
        "share",
        "share of pairs with a positive margin; a tied label counts ½",
        "0.5 at the start; above 0.5 later; 1.0 for long means over-fitting",
    ),
    MetricDefinition(
        "learner/chosen_logprob",
        Mean,
        "nats",
        "log π(chosen | prompt), summed over its tokens",
        "may fall; a steep fall together with the rejected one is likelihood displacement",
    ),
    MetricDefinition(
        "learner/rejected_logprob",
        Mean,
        "nats",
        "log π(rejected | prompt), summed over its tokens",
        "falls faster than the chosen one",
    ),
    MetricDefinition("learner/chosen_reward", Mean, "nats", "β·(log π − log π_ref)(chosen)", "near or above 0"),
    MetricDefinition(
        "learner/rejected_reward", Mean, "nats", "β·(log π − log π_ref)(rejected)", "below the chosen one"
    ),
    MetricDefinition(
        "learner/grad_norm",
        Last,
        "",
        "L2 norm of the whole gradient before clipping",
        "steady; spikes of 10× announce divergence",
    ),
    MetricDefinition("learner/learning_rate", Last, "", "learning rate of this step", "as scheduled"),
    MetricDefinition(
        "data/reward",
        Mean,
        "log-odds",
        "mean oracle reward of the batch's responses, both sides",
        "rises; absent where the oracle gives no scores",
    ),
    MetricDefinition(
        "data/reward_gap",
        Mean,
        "log-odds",
        "mean |reward_a − reward_b|",
        "well above 0: pairs without contrast teach little",
    ),
    MetricDefinition("data/tie_share", Mean, "share", "share of labels with P(a ≻ b) = ½", "small"),
    MetricDefinition(
        "data/kl",
        Mean,
        "nats",
        "Σ_t log π(y_t) − log π_ref(y_t) over responses sampled with c = 0, under the version that sampled",
        "grows slowly; single batches are noisy and may be below 0",
    ),
    MetricDefinition(
        "data/response_tokens",
        Mean,
        "tokens",
        "response length, end of sequence included",
        "no steady drift: a drift is length hacking",
    ),
    MetricDefinition(
        "data/truncated_share",
        Mean,
        "share",
        "share of responses cut at `generation.max_new_tokens`",
        "task dependent; a rise is length hacking",
    ),
    MetricDefinition(
        "data/branch/{branch}",
        Mean,
        "share",
        "share of pairs drawn from this branch of the sampler",
        "near the branch's weight",
    ),
    MetricDefinition(
        "pipeline/age_mean",
        Mean,
        "steps",
        "(step − 1) − oldest policy version that sampled a token of the pair",
        "below the bound",
    ),
    MetricDefinition(
        "pipeline/age_max",
        Max,
        "steps",
        "the same, largest of the batch",
        "never above `pipeline.max_staleness_steps`",
    ),
    MetricDefinition(
        "pipeline/mixed_version_share",
        Mean,
        "share",
        "share of responses whose tokens come from more than one policy version",
        "grows with response length",
    ),
    MetricDefinition(
        "pipeline/in_flight",
        Last,
        "pairs",
        "pairs admitted by the gate and not yet trained or ended",
        "at most (`max_staleness_steps` + 1) · `batch_pairs`",
    ),
    MetricDefinition(
        "pipeline/wait_seconds",
        Sum,
        "s",
        "learner waiting for its next batch",
        "near 0 when generation keeps up",
    ),
    MetricDefinition("pipeline/train_seconds", Sum, "s", "forward, backward and optimiser step", "steady"),
    MetricDefinition(
        "pipeline/sync_seconds",
        Sum,
        "s",
        "ledger write, then new weights pushed to and pulled by all generators",
        "small beside train_seconds",
    ),
    MetricDefinition(
        "pipeline/pairs_per_second",
        Last,
        "1/s",
        "pairs of this step ÷ (wait + train + sync) seconds",
        "steady",
    ),
    MetricDefinition(
        "evaluation/reward",
        Mean,
        "log-odds",
        "mean oracle reward on held-out prompts, one sample a prompt",
        "rises",
    ),
    MetricDefinition(
        "evaluation/kl",
        Mean,
        "nats",
        "mean over held-out prompts of Σ_t log π(y_t) − log π_ref(y_t), y ∼ π",
        "grows slowly; much KL for little reward is reward hacking",
    ),
    MetricDefinition("evaluation/objective", Mean, "log-odds", "J = reward − β·KL on held-out prompts", "rises"),
    MetricDefinition(
        "evaluation/response_tokens",
        Mean,
        "tokens",
        "mean response length on held-out prompts",
        "no steady drift",
    ),
    MetricDefinition(
        "role/{role}/utilization",
        Last,
        "share",
        "seconds with at least one call under way ÷ seconds elapsed",
        "one role near 1: that role is the bottleneck",
    ),
    MetricDefinition(
        "role/{role}/peak_memory_mib",
        Max,
        "MiB",
        "peak resident memory of the role's process",
        "flat after step 2",
    ),
)

_PATTERNS = [
    (re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(definition.key))), definition) for definition in METRICS
]


def definition_of(key: str) -> MetricDefinition:
    """The definition that ``key`` falls under; ValueError if there is none."""
    for pattern, definition in _PATTERNS:
        if pattern.fullmatch(key):
            return definition
    raise ValueError(f"metric {key!r} has no definition: add it to METRICS")


def reduce_metrics(metrics: Iterable[Metric]) -> dict[str, float]:
    """One number a key, in order of first appearance.

    Raises:
        ValueError: a key that METRICS does not define, or a reduction other than the defined one.
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
        "Generated from `pilaf_ray/observability/metrics.py`; do not edit by hand.",
        "",
        "`metrics.jsonl` holds one object a learner step with these keys, beside `step` and `time`",
        "(seconds since 1970). Steps count from 1. A metric that does not apply to a step is left out.",
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
