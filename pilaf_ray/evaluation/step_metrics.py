"""One line of metrics.jsonl; docs/metrics.md says what each key means."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pilaf_ray.pipeline.budget import Spent
from pilaf_ray.pipeline.step_report import StepReport
from pilaf_ray.sampling.normalizers import z_value
from pilaf_ray.types import LabeledPair, PairCost, SampledResponse


def step_metrics(report: StepReport) -> dict[str, Any]:
    """Metrics of one learner step."""
    responses = [response for item in report.batch for response in (item.pair.a, item.pair.b)]
    lengths = [len(response.token_ids) for response in responses]
    return {
        "step": report.result.step,
        "loss": report.result.loss,
        **{name if "/" in name else f"train/{name}": value for name, value in report.result.metrics.items()},
        "reward/policy": _mean([reward for _, reward, _ in _on_policy(report.batch) if reward is not None]),
        "kl/policy": _mean([sum(r.logprobs) - reference for r, _, reference in _on_policy(report.batch)]),
        "age/mean": _mean([float(age) for age in report.ages]),
        "age/max": max(report.ages),
        "response/tokens": _mean([float(length) for length in lengths]),
        "pairs/interpolated": sum(item.pair.branch == "interpolated" for item in report.batch),
        "pairs/weight_max": max(item.pair.loss_weight for item in report.batch),
        **_z_metrics(report.batch),
        **_cost_metrics(report.batch if report.is_first_use else ()),
        **_total_metrics(report.spent),
        "pairs/in_flight": report.in_flight,
        "time/wait": report.wait_seconds,
        "time/train": report.train_seconds,
        "time/push": report.push_seconds,
        "time/evaluation": report.evaluation_seconds,
        "time/sync": report.sync_seconds,
    }


def _z_metrics(batch: Sequence[LabeledPair]) -> dict[str, float | None]:
    """Means of the unbiased samples of Z⁺, Z⁻ and their product that the pairs' draws gave."""
    draws = [item.pair.draw for item in batch if item.pair.draw is not None]
    sides = [(draw.log_z_a, draw.log_z_b) for draw in draws]
    return {
        "z/plus": _mean([z_value(a) for a, _ in sides if a is not None]),
        "z/minus": _mean([z_value(b) for _, b in sides if b is not None]),
        "z/product": _mean([z_value(a + b) for a, b in sides if a is not None and b is not None]),
    }


def _cost_metrics(batch: Sequence[LabeledPair]) -> dict[str, float]:
    """What the batch's pairs cost together."""
    draws = [item.pair.draw for item in batch if item.pair.draw is not None]
    total = sum((draw.cost for draw in draws), start=PairCost(sequence_forwards=0, labelled_responses=0))
    return {
        "cost/sequence_forwards": total.sequence_forwards,
        "cost/scoring_forwards": total.scoring_forwards,
        "cost/generated_tokens": total.generated_tokens,
        "cost/labelled_responses": total.labelled_responses,
    }


def busy_metrics(shares: Mapping[str, float]) -> dict[str, float]:
    """Each role's busy share since the step before, as metrics."""
    return {f"busy/{role}": share for role, share in shares.items()}


def _total_metrics(spent: Spent | None) -> dict[str, float]:
    spent = spent or Spent()
    return {
        "total/labels": spent.labels,
        "total/generated_tokens": spent.generated_tokens,
        "total/seconds": spent.seconds,
    }


def spent_before(metrics: Path) -> Spent:
    """What the last line of metrics.jsonl says that the run has spent."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    if not lines:
        return Spent()
    last = json.loads(lines[-1])
    return Spent(**{field.name: last[f"total/{field.name}"] for field in fields(Spent)})


def total_costs(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sums of the ``cost/…`` keys over a run."""
    names = [key for key in (metrics[0] if metrics else {}) if key.startswith("cost/")]
    return {name.removeprefix("cost/"): sum(line[name] for line in metrics) for name in names}


def _on_policy(batch: Sequence[LabeledPair]) -> list[tuple[SampledResponse, float | None, float]]:
    """(response, oracle's reward, log π_ref) of the responses with coefficient 0."""
    sides = [
        (side, reward, reference)
        for item in batch
        for side, reward, reference in (
            (item.pair.a, item.label.reward_a, item.reference.a),
            (item.pair.b, item.label.reward_b, item.reference.b),
        )
    ]
    return [side for side in sides if side[0].coefficient == 0.0]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
