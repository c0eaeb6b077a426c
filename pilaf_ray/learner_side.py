"""The learner's side of a run: the policy alone, with a reward model as a monitor, or optimised against it."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from pilaf_ray import build_rewards
from pilaf_ray.actors.launch import Roles
from pilaf_ray.config.algorithms import RolloutAlgorithm
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.data.prompt_turns import PromptSource
from pilaf_ray.pipeline.policy_optimization import PolicyOptimizer
from pilaf_ray.pipeline.ports import LearnerPort
from pilaf_ray.pipeline.reward_monitor import MonitoredLearner
from pilaf_ray.pipeline.reward_trainer import RewardTrainer
from pilaf_ray.pipeline.rollout_stream import RolloutStream
from pilaf_ray.pipeline.supervision import Report, no_report


class LearnerSide:
    """What the controller calls its learner, and what a checkpoint holds of it.

    Args:
        prompts: that rollouts are drawn from.
        warn: is given the step and what is wrong with the reward model.
        report: told of rollouts that are set aside.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptSource,
        roles: Roles,
        *,
        warn: Callable[[int, str], None],
        report: Report = no_report,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._roles = roles
        self._report = report
        self._rewards: RewardTrainer | None = None
        if roles.reward is not None:
            self._rewards = build_rewards.reward_trainer(config, roles.reward, roles.store, warn=warn)
        self._rollouts: RolloutStream | None = None

    @contextlib.asynccontextmanager
    async def running(self, start_step: int) -> AsyncIterator[LearnerPort]:
        """The learner for the steps after ``start_step``; rollouts are sampled while the block runs."""
        roles = self._roles
        if self._rewards is None or roles.reward is None:
            yield roles.learner
        elif not isinstance(self._config.algorithm, RolloutAlgorithm):
            yield MonitoredLearner(learner=roles.learner, rewards=self._rewards)
        else:
            self._rollouts = build_rewards.rollout_stream(
                self._config,
                self._prompts,
                generator=roles.generators,
                reference=roles.reference,
                reward=roles.reward,
                start_step=start_step,
                report=self._report,
            )
            async with self._rollouts.running():
                yield PolicyOptimizer(learner=roles.learner, rewards=self._rewards, rollouts=self._rollouts)

    def served(self) -> None:
        """The newest step's weights are served everywhere: rollouts under them may begin."""
        if self._rollouts is not None:
            self._rollouts.release()

    async def save(self, checkpoint: Path) -> None:
        """Write ``learner/`` and, where there is a reward model, ``reward/``."""
        (checkpoint / "learner").mkdir()
        await self._roles.learner.save(checkpoint.resolve() / "learner")
        if self._rewards is not None:
            (checkpoint / "reward").mkdir()
            await self._rewards.save(checkpoint.resolve() / "reward")

    async def load(self, checkpoint: Path) -> None:
        """Restore what :meth:`save` wrote; the ledger has been put back to the same step."""
        await self._roles.learner.load(checkpoint / "learner")
        if self._rewards is not None:
            await self._rewards.load(checkpoint / "reward")
