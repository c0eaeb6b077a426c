"""The checkpoints of a run under way: written beside the steps, kept by policy, copied away."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.engines.learner_layout import LearnerLayout, described
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.run_journal import RunJournal
from pilaf_ray.run_mirror import run_mirror


def learner_layouts(config: RunConfig) -> dict[str, LearnerLayout]:
    """The learners of a run by the name of their part of a checkpoint."""
    learner, reward = config.learner, config.reward_model
    layouts = {"learner": LearnerLayout(ranks=learner.ranks, zero_stage=learner.zero_stage)}
    if reward is not None:
        layouts["reward"] = LearnerLayout(ranks=reward.ranks, zero_stage=reward.zero_stage)
    return layouts


class RunCheckpoints:
    """The store of a run's checkpoints, and their copies at ``checkpoint.mirror``."""

    def __init__(self, config: RunConfig, folder: RunFolder, journal: RunJournal) -> None:
        settings = config.checkpoint
        self._journal = journal

        def scores() -> dict[int, float]:
            return journal.evaluations.objectives(config.algorithm.beta)

        self._mirror = run_mirror(config, folder.path, scores=scores, report=journal.event)
        self.store = CheckpointStore(
            folder.checkpoints,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
            keep_every=settings.keep_every,
            scores=scores,
            facts=described(learner_layouts(config)),
            held=lambda: self._mirror.held if self._mirror is not None else set(),
        )

    async def save(self, step: int, writer: Callable[[Path], Awaitable[None]], *, serving: int) -> None:
        """Let ``writer`` fill a checkpoint of ``step``; what follows goes on beside the next steps.

        Args:
            serving: the step that generators sample from until the end of the round.
        """

        async def published(step: int, path: Path) -> None:
            if self._mirror is not None:
                self._mirror.add(step, serving=serving)
            await self._journal.checkpoint(step, path, policy=path / "learner" / "hf")

        with self._journal.spans.measure("checkpoint"):
            await self.store.write_behind(step, writer, published=published, keep=serving)

    async def copied(self) -> None:
        """Return once the copies that are under way are there, or given up."""
        if self._mirror is not None:
            self._journal.phase("waiting for the copy of the last checkpoint")
            await self._mirror.finish()
