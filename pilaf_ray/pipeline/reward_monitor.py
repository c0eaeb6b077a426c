"""A learner with a reward model beside it, as one learner."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from pilaf_ray.pipeline.ports import LearnerPort
from pilaf_ray.pipeline.reward_trainer import RewardTrainer
from pilaf_ray.types import LabeledPair, StepResult


class MonitoredLearner:
    """Both take each batch in at the same time; r̂ tells how well it tracks the oracle, and nothing follows from it."""

    def __init__(self, *, learner: LearnerPort, rewards: RewardTrainer) -> None:
        self._learner = learner
        self._rewards = rewards

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        """The policy's step, with the metrics of r̂ added."""
        async with asyncio.TaskGroup() as both:
            policy = both.create_task(self._learner.train_step(step, batch))
            rewards = both.create_task(self._rewards.take_in(step, batch))
        return replace(policy.result(), metrics={**policy.result().metrics, **rewards.result()})
