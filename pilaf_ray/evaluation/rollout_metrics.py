"""Figures of one step's rollouts; docs/metrics.md says what each key means."""

import math
from collections.abc import Sequence

from pilaf_ray.evaluation.statistics import mean
from pilaf_ray.types import FinishReason, ScoredGroup


def rollout_metrics(step: int, groups: Sequence[ScoredGroup], *, pairs: int) -> dict[str, float]:
    """Figures of the rollouts of ``step``, beside ``pairs`` labelled pairs."""
    responses = [response for group in groups for response in group.responses]
    scores = [score for group in groups for score in group.scores.values]
    references = [row for group in groups for row in group.reference_logprobs]
    tokens = sum(len(response.token_ids) for response in responses)
    centre = mean(scores)
    return {
        "rollouts/responses": float(len(responses)),
        "rollouts/share": len(responses) / (len(responses) + 2 * pairs),
        "rollouts/reward": centre,
        "rollouts/reward_spread": math.sqrt(mean([(score - centre) ** 2 for score in scores])),
        "rollouts/equal_groups": mean([float(len(set(group.scores.values)) == 1) for group in groups]),
        "rollouts/reward_version": float(min(group.scores.version for group in groups)),
        "rollouts/kl": mean([sum(r.logprobs) - sum(row) for r, row in zip(responses, references, strict=True)]),
        "rollouts/tokens": tokens / len(responses),
        "rollouts/stopped": mean([float(r.finish_reason == FinishReason.STOP) for r in responses]),
        "rollouts/age_max": float(max(step - 1 - group.min_policy_version for group in groups)),
    }
