"""Optimising the policy against r̂, as a learner of the controller: pairs feed r̂, rollouts feed the policy.

     controller ── pairs of step k ──▶ RewardTrainer ──▶ r̂
                                                          │ scores
     RolloutStream ── rollouts of step k ─────────────────┴─▶ policy's step k

The controller's gate, ledger, labelling and weight sync stay what they are: a pair counts as
trained when r̂ has taken it in.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from pilaf_ray.evaluation.rollout_metrics import rollout_metrics
from pilaf_ray.pipeline.reward_trainer import RewardTrainer
from pilaf_ray.pipeline.rollout_stream import RolloutStream
from pilaf_ray.types import LabeledPair, ScoredGroup, StepResult


class RolloutLearnerPort(Protocol):
    """The policy learner where it steps on rollouts."""

    async def train_rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> StepResult:
        """Take step ``step`` (from 1) on ``groups``; raises NonFiniteLossError."""
        ...


class PolicyOptimizer:
    """Each step: r̂ takes the pairs in, while the policy steps on the next rollouts.

    Rollouts are scored by the r̂ of the moment when they are finished; with
    ``max_staleness_steps`` 0 that is the r̂ after the step before.
    """

    def __init__(self, *, learner: RolloutLearnerPort, rewards: RewardTrainer, rollouts: RolloutStream) -> None:
        self._learner = learner
        self._rewards = rewards
        self._rollouts = rollouts

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        """The policy's step, with the metrics of its rollouts and of r̂ added."""
        async with asyncio.TaskGroup() as both:
            rewards = both.create_task(self._rewards.take_in(step, batch))
            policy = both.create_task(self._train_policy(step, pairs=len(batch)))
        return replace(policy.result(), metrics={**policy.result().metrics, **rewards.result()})

    async def _train_policy(self, step: int, *, pairs: int) -> StepResult:
        groups = await self._rollouts.next_batch()
        result = await self._learner.train_rollouts(step, groups)
        return replace(result, metrics={**result.metrics, **rollout_metrics(step, groups, pairs=pairs)})
