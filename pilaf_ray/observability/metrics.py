"""What is measured: typed reductions, and the one table that defines every key.

``python -m pilaf_ray.observability.metrics > docs/metrics.md`` writes the table as a page.
"""

import math
import sys
from collections.abc import Iterable, Sequence

from pilaf_ray.observability.metric_types import Last, Max, Mean, Metric, MetricDefinition, Reduction, Sum
from pilaf_ray.observability.reward_metrics import REWARD_METRICS

METRICS: tuple[MetricDefinition, ...] = (
    MetricDefinition(
        "loss",
        Mean,
        "nats",
        "mean of the preference loss over the batch's pairs",
        "`dpo` starts at log 2 ≈ 0.693 when policy and reference are equal; falls slowly",
    ),
    MetricDefinition(
        "train/margin",
        Mean,
        "nats",
        "β·[(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)]",
        "starts near 0; rises",
    ),
    MetricDefinition(
        "train/accuracy",
        Mean,
        "share",
        "share of pairs with a positive margin; a tied label counts ½",
        "above 0.5 after the first steps; 1.0 for long is over-fitting",
    ),
    MetricDefinition(
        "train/chosen_logprob",
        Mean,
        "nats",
        "log π(chosen | prompt), summed over its tokens",
        "may fall; a steep fall together with the rejected one is likelihood displacement",
    ),
    MetricDefinition(
        "train/rejected_logprob",
        Mean,
        "nats",
        "log π(rejected | prompt), summed over its tokens",
        "falls faster than the chosen one",
    ),
    MetricDefinition("train/chosen_reward", Mean, "nats", "β·(log π − log π_ref)(chosen)", "near or above 0"),
    MetricDefinition("train/rejected_reward", Mean, "nats", "β·(log π − log π_ref)(rejected)", "below the chosen one"),
    MetricDefinition(
        "train/grad_norm",
        Last,
        "",
        "L2 norm of the whole gradient before clipping",
        "steady; a jump by a factor of ten announces divergence",
    ),
    MetricDefinition("train/learning_rate", Last, "", "learning rate of this step", "as scheduled"),
    MetricDefinition(
        "reward/policy",
        Mean,
        "log-odds",
        "mean oracle reward of the batch's responses that were sampled with c = 0",
        "rises; null where the oracle gives no scores or no response has c = 0",
    ),
    MetricDefinition(
        "kl/policy",
        Mean,
        "nats",
        "mean of Σ_t log π(y_t) − log π_ref(y_t) over the same responses, π being the version that sampled them",
        "grows slowly; one batch is noisy and may be below 0",
    ),
    MetricDefinition(
        "age/mean",
        Mean,
        "steps",
        "(step − 1) − oldest policy version that sampled a token of the pair",
        "at most `pipeline.max_staleness_steps`",
    ),
    MetricDefinition(
        "age/max", Max, "steps", "the same, largest of the batch", "never above `pipeline.max_staleness_steps`"
    ),
    MetricDefinition(
        "response/tokens",
        Mean,
        "tokens",
        "response length, end of sequence included",
        "no steady drift: a drift is length hacking",
    ),
    MetricDefinition(
        "pairs/interpolated",
        Sum,
        "pairs",
        "pairs of the batch that were drawn from the `interpolated` branch",
        "near its weight times `batch_pairs`",
    ),
    MetricDefinition(
        "pairs/weight_max",
        Max,
        "",
        "largest loss weight of the batch's pairs; `t_pilaf` alone has other weights than 1",
        "a few units; far above, few pairs are the whole gradient: see `sampler.max_weight`",
    ),
    MetricDefinition(
        "z/plus",
        Mean,
        "",
        "mean over responses with c = +β of ∏_t Z_t, Z_t = Σ_v π(v)^(1+c)·π_ref(v)^(−c) at position t; each is an "
        "unbiased sample of Z⁺ = E_π[exp(r_θ)]. `pilaf_reward`: mean of exp(r̂) over the pool",
        "1 where π = π_ref; grows with the KL; null where no pair of the batch is mixed",
    ),
    MetricDefinition("z/minus", Mean, "", "the same for c = −β and Z⁻ = E_π[exp(−r_θ)]", "as `z/plus`"),
    MetricDefinition(
        "z/product",
        Mean,
        "",
        "mean over mixed pairs of the product of their two samples, an unbiased sample of Z⁺Z⁻ ≈ exp(Var_π(r_θ))",
        "from 1 up; far above 1, the fair coin of `pilaf` is far from T-PILAF's weights",
    ),
    MetricDefinition(
        "cost/sequence_forwards",
        Sum,
        "forwards",
        "sequence forwards that sampled the batch's pairs: 1 a response from π or π_ref, 2 a mixed one; "
        "candidates included. Like every cost, 0 where the pairs are trained on for a second time",
        "`batch_pairs` times 2 for vanilla and hybrid, 3 for pilaf, n for best of n",
    ),
    MetricDefinition(
        "cost/scoring_forwards",
        Sum,
        "forwards",
        "forwards of π_ref or r̂ that only scored candidates",
        "`batch_pairs` · n for best of n by r_θ, 0 for samplers without candidates",
    ),
    MetricDefinition(
        "cost/generated_tokens",
        Sum,
        "tokens",
        "tokens of every response that was sampled for the batch's pairs, candidates included",
        "2 · `batch_pairs` · `response/tokens` without candidates",
    ),
    MetricDefinition(
        "cost/labelled_responses",
        Sum,
        "responses",
        "responses that the oracle read for the batch's pairs",
        "2 · `batch_pairs`; n · `batch_pairs` where the oracle ranks candidates",
    ),
    MetricDefinition(
        "total/labels",
        Last,
        "labels",
        "labels of all pairs that were trained on up to here: half the responses that the oracle read for them",
        "at most `run.max_labels`",
    ),
    MetricDefinition(
        "total/generated_tokens",
        Last,
        "tokens",
        "tokens sampled for all pairs that were trained on up to here, candidates included",
        "reaches `run.max_generated_tokens` at the end, if that is what ends the run",
    ),
    MetricDefinition(
        "total/seconds", Last, "s", "wall time of the training loop over all attempts", "as `total/generated_tokens`"
    ),
    MetricDefinition(
        "pairs/in_flight",
        Last,
        "pairs",
        "pairs admitted by the gate and not yet trained or ended, after the step",
        "at most (`max_staleness_steps` + 1) · `batch_pairs`",
    ),
    *REWARD_METRICS,
    MetricDefinition("time/wait", Sum, "s", "learner waiting for its next batch", "near 0 when generation keeps up"),
    MetricDefinition("time/train", Sum, "s", "forward, backward and optimiser step", "steady"),
    MetricDefinition(
        "time/push",
        Sum,
        "s",
        "learner writing to the ledger and handing out its weights; it cannot train meanwhile",
        "small beside `time/train`",
    ),
    MetricDefinition(
        "time/sync",
        Sum,
        "s",
        "until every generator served the version before this one; the learner trains meanwhile",
        "below `time/train`",
    ),
    *(
        MetricDefinition(
            f"busy/{role}",
            Mean,
            "share",
            f"share of the time since the step before in which the role `{role}` had a call under way, "
            "as the controller sees it",
            "the role that is always near 1 is the bottleneck",
        )
        for role in ("generator", "reference", "oracle", "learner", "reward")
    ),
)

_DEFINITIONS = {definition.key: definition for definition in METRICS}


def definition_of(key: str) -> MetricDefinition:
    """The definition of ``key``; ValueError if there is none."""
    if key not in _DEFINITIONS:
        raise ValueError(f"metric {key!r} has no definition: add it to METRICS")
    return _DEFINITIONS[key]


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
