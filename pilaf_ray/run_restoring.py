"""A run put back to its newest checkpoint: ledger, learner and generators at one step."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pilaf_ray import build
from pilaf_ray.actors.launch import Roles
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.errors import LedgerError
from pilaf_ray.learner_side import LearnerSide
from pilaf_ray.pipeline.ports import WeightSyncPort
from pilaf_ray.pipeline.supervision import Report
from pilaf_ray.store.records import UnfinishedWork


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredRun:
    """Where a run goes on."""

    step: int
    """The last step that counts."""
    unfinished: UnfinishedWork
    """What is left of later ones."""
    next_index: int
    """Index of the next new plan."""


class RunRestorer:
    """Puts the roles back to the newest checkpoint that verifies, or to the beginning.

    Args:
        checkpoints: one that is being written is finished first.
        report: told of the checkpoint that was loaded.
    """

    def __init__(self, config: RunConfig, checkpoints: CheckpointStore, *, report: Report) -> None:
        self._config = config
        self._checkpoints = checkpoints
        self._report = report

    async def restore(
        self,
        roles: Roles,
        side: LearnerSide,
        sync: WeightSyncPort,
        *,
        resume: bool,
        rebuilt: bool = False,
        set_aside: Sequence[tuple[str, str]] = (),
    ) -> RestoredRun:
        """Where the run goes on; without ``resume`` at its beginning, and then the ledger must be empty.

        Args:
            rebuilt: the learner is new, and generators serve what the one before it had learned.
            set_aside: (id, reason) of pairs that are not to be trained on again.

        Raises:
            LedgerError: the ledger is of an earlier run, or does not add up.
            CheckpointError: the checkpoint that generators are to serve is not there.
        """
        if not resume and await roles.store.next_plan_index():
            raise LedgerError(
                f"store.url: the database holds a run '{self._config.run.name}' already: choose another run.name"
            )
        await self._checkpoints.finish()
        found = await asyncio.to_thread(self._checkpoints.latest) if resume else None
        step = found[0] if found is not None else 0
        await roles.store.reset_after(step)
        for pair_id, reason in set_aside:
            await roles.store.reject(pair_id, reason)
        if found is not None:
            await side.load(found[1])
            self._report("checkpoint loaded", step=step)
        await self._serve_again(roles, sync, step, found, rebuilt=rebuilt)
        (await roles.store.counts()).check()
        unfinished = await roles.store.unfinished()
        return RestoredRun(step=step, unfinished=unfinished, next_index=await roles.store.next_plan_index())

    async def _serve_again(
        self, roles: Roles, sync: WeightSyncPort, step: int, found: tuple[int, Path] | None, *, rebuilt: bool
    ) -> None:
        """Give the generators the version that they served after ``step``: in a round, that of its beginning.

        Generators serve version 0 from their start on, and where it is a round's they never left it.
        """
        served = build.build_schedule(self._config, start_step=step).served_version(step)
        if served == 0 and not (rebuilt and step == 0):
            return
        if served < step:
            await roles.learner.load(self._checkpoints.at(served) / "learner")
        await sync.serve(served, await sync.push(served))
        if served < step and found is not None:
            await roles.learner.load(found[1] / "learner")
