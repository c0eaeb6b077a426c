"""The checkpoints of a run under way: written beside the steps, kept by policy, copied away."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

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


class CompactedLedger(Protocol):
    """What drops answers that nothing needs; see :meth:`pilaf_ray.store.ledger.PreferenceLedger.compact`."""

    async def compact(self, through_step: int, window_pairs: int, held_out: float) -> int: ...


class RunCheckpoints:
    """The store of a run's checkpoints, and their copies at ``checkpoint.mirror``.

    Args:
        ledger: the run's, as it is now.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, journal: RunJournal, *, ledger: Callable[[], CompactedLedger]
    ) -> None:
        settings = config.checkpoint
        self._config, self._journal, self._ledger = config, journal, ledger
        self.newest: int | None = None
        """The step of the checkpoint that was written last, or is being published."""

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
            await self._compact(step)

        with self._journal.spans.measure("checkpoint"):
            await self.store.write_behind(step, writer, published=published, keep=serving)
        self.newest = step

    async def _compact(self, step: int) -> None:
        """Let the ledger drop answers that no checkpoint can bring back, where that is wanted."""
        after, reward = self._config.store.compact_after_steps, self._config.reward_model
        if after is None:
            return
        # Any of the newest ones is gone back to where those after it are damaged; keep_best and keep_every are not.
        through = min(step - after, *self.store.steps()[-self._config.checkpoint.keep_last :])
        if through < 1:
            return
        replay = (0, 0.0) if reward is None else (reward.replay.window_pairs, reward.replay.held_out)
        dropped = await self._ledger().compact(through, *replay)
        if dropped:
            self._journal.event("ledger compacted", through_step=through, pairs=dropped)

    async def copied(self) -> None:
        """Return once the copies that are under way are there, or given up."""
        if self._mirror is not None:
            self._journal.phase("waiting for the copy of the last checkpoint")
            await self._mirror.finish()
