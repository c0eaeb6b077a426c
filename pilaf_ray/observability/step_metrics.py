"""The metrics of one learner step, computed outside the loops."""

from collections.abc import Iterator

from pilaf_ray.observability.metrics import Last, Max, Mean, Metric, Sum, reduce_metrics
from pilaf_ray.pipeline.controller import StepReport
from pilaf_ray.types import FinishReason, LabeledPair, SampledResponse

_LEARNER_LAST = ("grad_norm", "learning_rate")
_LEARNER_MEAN = (
    "margin",
    "accuracy",
    "chosen_logprob",
    "rejected_logprob",
    "chosen_reward",
    "rejected_reward",
)


def step_metrics(report: StepReport) -> dict[str, float]:
    """Every metric of the step by its key in ``docs/metrics.md``."""
    return reduce_metrics([*_learner(report), *_data(report), *_pipeline(report)])


def _learner(report: StepReport) -> Iterator[Metric]:
    result, pairs = report.result, len(report.batch)
    yield Metric("learner/loss", Mean(result.loss, pairs))
    for name in _LEARNER_MEAN:
        if name in result.metrics:
            yield Metric(f"learner/{name}", Mean(result.metrics[name], pairs))
    for name in _LEARNER_LAST:
        if name in result.metrics:
            yield Metric(f"learner/{name}", Last(result.metrics[name]))


def _data(report: StepReport) -> Iterator[Metric]:
    branches = sorted({item.pair.plan.branch for item in report.batch})
    for item in report.batch:
        label = item.label
        if label.reward_a is not None and label.reward_b is not None:
            yield Metric("data/reward", Mean((label.reward_a + label.reward_b) / 2, 2))
            yield Metric("data/reward_gap", Mean(abs(label.reward_a - label.reward_b)))
        yield Metric("data/tie_share", Mean(float(label.is_tie)))
        for branch in branches:
            yield Metric(f"data/branch/{branch}", Mean(float(item.pair.plan.branch == branch)))
        for response, reference in _sides(item):
            # Only samples of π itself estimate its KL without importance weights.
            if response.coefficient == 0.0:
                yield Metric("data/kl", Mean(sum(response.logprobs) - reference))
            yield Metric("data/response_tokens", Mean(len(response.token_ids)))
            cut = response.finish_reason is FinishReason.LENGTH
            yield Metric("data/truncated_share", Mean(float(cut)))


def _pipeline(report: StepReport) -> Iterator[Metric]:
    for age in report.ages:
        yield Metric("pipeline/age_mean", Mean(age))
        yield Metric("pipeline/age_max", Max(age))
    for item in report.batch:
        for response, _ in _sides(item):
            mixed = response.min_policy_version != response.max_policy_version
            yield Metric("pipeline/mixed_version_share", Mean(float(mixed)))
    yield Metric("pipeline/in_flight", Last(report.in_flight))
    yield Metric("pipeline/wait_seconds", Sum(report.wait_seconds))
    yield Metric("pipeline/train_seconds", Sum(report.train_seconds))
    yield Metric("pipeline/sync_seconds", Sum(report.sync_seconds))
    seconds = report.wait_seconds + report.train_seconds + report.sync_seconds
    if seconds > 0:
        yield Metric("pipeline/pairs_per_second", Last(len(report.batch) / seconds))


def _sides(item: LabeledPair) -> tuple[tuple[SampledResponse, float], tuple[SampledResponse, float]]:
    """Both responses, each with its log π_ref."""
    return (item.pair.a, item.reference.a), (item.pair.b, item.reference.b)
