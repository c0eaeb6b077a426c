"""People as the preference oracle: minutes to days, several a pair, and never a call that runs into a deadline.

Pairs wait at the labelling desk; one loop asks the desk what is new and resolves those that have enough
votes. The run goes on meanwhile, as far as the staleness gate lets it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pilaf_ray.oracle.aggregation import VALUES, dawid_skene, majority, side
from pilaf_ray.store.desk import Opinions
from pilaf_ray.store.records import HUMAN
from pilaf_ray.types import PreferenceLabel, ResponsePair

logger = logging.getLogger(__name__)

NOBODY = "nobody answered"
"""Beginning of the reason of an abstention that a deadline made."""


class DeskPort(Protocol):
    """The desk, wherever it is."""

    async def want(self, pair_ids: Sequence[str], votes_per_pair: int) -> Mapping[str, Opinions]:
        """Say which pairs people are to judge; returns what is newly known of them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HumanRules:
    """When votes make a label."""

    votes_per_pair: int = 1
    aggregation: str = "majority"
    """majority or dawid_skene."""
    undo_seconds: float = 10.0
    """A vote counts when it is so old, so that its giver can take it back."""
    skips_to_abstain: int = 2
    """A pair that so many annotators skipped, and nobody judged, is an abstention."""
    answer_seconds: float | None = None
    """An abstention after so long a wait; no limit with None."""


@dataclass(kw_only=True, slots=True)
class _Waiting:
    label: asyncio.Future[PreferenceLabel]
    since: float
    opinions: Opinions | None = None


class HumanOracle:
    """Labels pairs by the votes of annotators.

    Args:
        poll_seconds: how often the desk is asked.
        clock: seconds since 1970, as the desk's.
        sleep: waits between two questions.
    """

    def __init__(
        self,
        desk: DeskPort,
        rules: HumanRules,
        *,
        poll_seconds: float = 0.5,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._desk, self._rules = desk, rules
        self._poll_seconds, self._clock, self._sleep = poll_seconds, clock, sleep
        self._waiting: dict[str, _Waiting] = {}
        self._judged: dict[str, dict[str, int]] = {}
        self._loop: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Pairs that people have not decided yet."""
        return len(self._waiting)

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair, as soon as all of them have one."""
        names = [pair.plan.pair_id for pair in pairs]
        futures = []
        for name in names:
            waiting = _Waiting(label=asyncio.get_running_loop().create_future(), since=self._clock())
            self._waiting[name] = waiting
            futures.append(waiting.label)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._ask_until_done(), name="questions to the desk")
            self._loop.add_done_callback(self._fail)
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for name in names:
                self._waiting.pop(name, None)

    async def _ask_until_done(self) -> None:
        while self._waiting:
            found = await self._desk.want(list(self._waiting), self._rules.votes_per_pair)
            for name, opinions in found.items():
                if name in self._waiting:
                    self._waiting[name].opinions = opinions
            now = self._clock()
            for name, waiting in list(self._waiting.items()):
                label = self._decide(name, waiting, now)
                if label is not None and not waiting.label.done():
                    waiting.label.set_result(label)
                    del self._waiting[name]
            await self._sleep(self._poll_seconds)
        await self._desk.want([], self._rules.votes_per_pair)

    def _fail(self, task: asyncio.Task[None]) -> None:
        """A desk that does not answer fails whoever waits for it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            for waiting in self._waiting.values():
                if not waiting.label.done():
                    waiting.label.set_exception(error)

    def _decide(self, name: str, waiting: _Waiting, now: float) -> PreferenceLabel | None:
        rules, opinions = self._rules, waiting.opinions
        votes = opinions.votes if opinions else ()
        if len(votes) >= rules.votes_per_pair:
            newest = max(vote.created_at for vote in votes) / 1000
            if now - newest < rules.undo_seconds:
                return None
            probability = self._aggregate(name, {str(vote.annotator): vote.probability for vote in votes})
            reason = None if probability is not None else "annotators found no answer worth training on"
            return PreferenceLabel(pair_id=name, probability=probability, source=HUMAN, reason=reason)
        if opinions and not votes and len(opinions.skips) >= rules.skips_to_abstain:
            said = "; ".join(skip.reason or "no reason" for skip in opinions.skips)
            reason = f"skipped by {len(opinions.skips)} annotators: {said}"
            return PreferenceLabel(pair_id=name, probability=None, source=HUMAN, reason=reason)
        if rules.answer_seconds is not None and now - waiting.since >= rules.answer_seconds:
            reason = f"{NOBODY} within {rules.answer_seconds:g} s"
            return PreferenceLabel(pair_id=name, probability=None, source=HUMAN, reason=reason)
        return None

    def _aggregate(self, name: str, votes: Mapping[str, float | None]) -> float | None:
        given = {annotator: vote for annotator, vote in votes.items() if vote is not None}
        if self._rules.aggregation == "majority" or 2 * len(given) <= len(votes):
            return majority(list(votes.values()))
        self._judged[name] = {annotator: side(vote) for annotator, vote in given.items()}
        belief = dawid_skene(self._judged)[name]
        return sum(p * value for p, value in zip(belief, VALUES, strict=True))
