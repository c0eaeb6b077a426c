"""Weight sync over Ray handles, with a fallback and a behavioural probe."""

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pilaf_ray.actors.calls import call
from pilaf_ray.actors.launch import Roles
from pilaf_ray.errors import RoleLostError, WeightSyncError
from pilaf_ray.pipeline.supervision import Report, no_report
from pilaf_ray.pipeline.turns import own_device
from pilaf_ray.pipeline.weight_sync import WeightSync
from pilaf_ray.types import TokenPair


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedWeights:
    """A version that generators can fetch, and how the learner scores the probe with it."""

    ticket: Any
    probe_logprobs: list[list[float]]


class GeneratorUpdates:
    """The way from the learner group to generators: push, pull, second way, probe.

    Args:
        probe_items: (prompt, response) tokens whose log-probabilities are compared after an update.
        tolerance: largest difference of one of them, or None for no probe.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        probe_items: Sequence[TokenPair],
        tolerance: float | None,
        deadline_seconds: float,
        report: Report = no_report,
    ) -> None:
        self._roles = roles
        self._probe_items, self._tolerance = probe_items, tolerance
        self._deadline = deadline_seconds
        self._report = report
        self._asked: dict[int, Any] = {}
        """Who was asked to pull the newest version, by number."""

    async def push(self, version: int) -> PublishedWeights:
        """Publish; a learner that takes longer than the deadline counts as lost."""
        learner = self._roles.learner
        try:
            # Before the whole push is given up, so that the learner is blamed.
            async with asyncio.timeout(0.9 * self._deadline):
                # The learner's own answer is asked for now: when the generators have pulled, it has moved on.
                ticket = await learner.publish(version)
                logprobs = [] if self._tolerance is None else await learner.policy_logprobs(self._probe_items)
        except TimeoutError as error:
            raise RoleLostError(
                f"policy learner did not publish version {version} within weights.deadline_seconds={self._deadline:g}"
            ) from error
        return PublishedWeights(ticket=ticket, probe_logprobs=logprobs)

    def announce(self, update: PublishedWeights) -> None:
        """Newcomers pull this one before they sample."""
        self._roles.generators.follow(self._pull_somehow, update)

    def pulls(self) -> dict[int, Any]:
        """What brings each generator that samples now to an update."""
        self._asked = self._roles.generators.actors
        return {number: partial(self._pull_unless_lost, actor, number) for number, actor in self._asked.items()}

    async def recover(self, number: int, update: PublishedWeights, error: Exception) -> None:
        """Try the second way; replace a generator that cannot go it either, or is dead."""
        if (loss := self._roles.learner.loss) is not None:
            # Its death in the middle of a transfer is no generator's fault.
            raise loss
        actor = self._roles.generators.actors.get(number)
        if actor is None or actor is not self._asked.get(number):
            # It was lost, and what has taken its place has pulled: that one must not be replaced for it.
            return
        if isinstance(error, WeightSyncError):
            # Raises where the learner turns out to be lost now.
            again = await self._publish_again(update)
            try:
                await self._pull_second_way(actor, number, again, error)
                return
            except (WeightSyncError, RoleLostError) as second:
                self._report("second way failed", role="generator", replica=number, cause=str(second))
        self._roles.generators.lose(number, RoleLostError(str(error)))

    async def probe(self, version: int, update: PublishedWeights) -> None:
        """Raises WeightSyncError where an engine serves something else than the learner's weights."""
        actors = self._roles.generators.actors
        await asyncio.gather(*(self._probe_one(n, actor, version, update) for n, actor in actors.items()))

    async def _pull(self, actor: Any, number: int, update: PublishedWeights) -> None:
        remote = actor.update_weights.remote(update.ticket, self._deadline)
        await call(remote, role=f"generator-{number}", seconds=self._deadline, name="update_weights")

    async def _pull_unless_lost(self, actor: Any, number: int, update: PublishedWeights) -> None:
        # Neither a generator that is cut off nor one that waits for a learner that is gone has until the deadline.
        pull = self._roles.generators.unless_lost(number, self._pull(actor, number, update))
        await self._roles.learner.unless_lost(pull)

    async def _pull_somehow(self, actor: Any, number: int, update: PublishedWeights) -> None:
        try:
            await self._pull(actor, number, update)
        except WeightSyncError as error:
            if not self._roles.generators.follows(update):
                # It was superseded while the newcomer started; what is newest now comes next.
                raise
            await self._pull_second_way(actor, number, await self._publish_again(update), error)

    async def _publish_again(self, update: PublishedWeights) -> PublishedWeights:
        """The same version by way of the shared folder, where there is one."""
        again = await self._roles.learner.publish_again(update.ticket.version)
        return dataclasses.replace(update, ticket=again or update.ticket)

    async def _pull_second_way(self, actor: Any, number: int, again: PublishedWeights, error: Exception) -> None:
        """For whatever reason the first way failed."""
        version = again.ticket.version
        self._report("weights by the second way", role="generator", replica=number, version=version, cause=str(error))
        await self._pull(actor, number, again)

    async def _probe_one(self, number: int, actor: Any, version: int, update: PublishedWeights) -> None:
        for item, expected in zip(self._probe_items, update.probe_logprobs, strict=True):
            try:
                served: list[float] = await call(
                    actor.score.remote(*item), role=f"generator-{number}", seconds=0.9 * self._deadline
                )
            except RoleLostError as error:
                self._roles.generators.lose(number, error)
                return
            gap = max(abs(a - b) for a, b in zip(expected, served, strict=True))
            if self._tolerance is not None and gap > self._tolerance:
                raise WeightSyncError(
                    f"weights version {version}: generator {number} serves log-probabilities {gap:.3f} away from "
                    f"the learner's (weights.probe_tolerance={self._tolerance:g}); its weights are not what was sent"
                )


def make_weight_sync(
    roles: Roles,
    *,
    probe_items: Sequence[TokenPair],
    tolerance: float | None,
    deadline_seconds: float,
    report: Report = no_report,
) -> WeightSync[PublishedWeights]:
    """Push from the learner group, pull by every generator, then compare what is served."""
    updates = GeneratorUpdates(
        roles, probe_items=probe_items, tolerance=tolerance, deadline_seconds=deadline_seconds, report=report
    )
    turns = roles.turns
    return WeightSync(
        push=updates.push,
        announce=updates.announce,
        pulls=updates.pulls,
        recover=updates.recover,
        probe=updates.probe if tolerance is not None else None,
        deadline_seconds=deadline_seconds,
        # A push may be part of the learner's step.
        push_turn=partial(turns.within, "learner") if turns else own_device,
        serve_turn=partial(turns.turn, "generator") if turns else own_device,
    )
