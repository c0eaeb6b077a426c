"""The labelling desk: what annotators may ask of the ledger's single writer.

The desk keeps nothing of its own but which pairs the run wants people to judge; the run says so again
after every restart. Every answer is on disk before it is acknowledged, and has one key for each lease, so a
double click, a second tab and a repeated request are all the same answer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from sqlalchemy import func, select

from pilaf_ray.errors import LedgerError
from pilaf_ray.store import queries
from pilaf_ray.store.inbox import put_away, waiting_votes
from pilaf_ray.store.labels import effective_votes
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.records import HUMAN, LabelEvent, LabelKind, Lease, Vote
from pilaf_ray.store.tables import labels, pairs

logger = logging.getLogger(__name__)

HISTORY = 5000
PACE_ANSWERS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Opinions:
    """What annotators said of one waiting pair, as far as it counts now."""

    pair_id: str
    votes: tuple[LabelEvent, ...] = ()
    skips: tuple[LabelEvent, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """What waits for people."""

    waiting: int = 0
    """Pairs that the run wants judged and that are not labelled yet."""
    oldest_at: int | None = None
    """When the oldest of them was sampled; UTC, milliseconds."""
    leased: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What one annotator has done."""

    answers: int
    """Standing votes and skips."""
    newest_at: tuple[int, ...]
    """When the last ones were given, newest first; UTC, milliseconds."""

    @property
    def seconds_each(self) -> float | None:
        """Median time between the last answers."""
        gaps = [a - b for a, b in pairwise(self.newest_at)]
        return median(gaps) / 1000 if gaps else None


@dataclass(kw_only=True, slots=True)
class _Wanted:
    pair_ids: dict[str, None] = field(default_factory=dict)
    votes_per_pair: int = 1
    seen: int = 0
    """Number of the newest label event that was looked at."""


class LabelDesk:
    """Leases, votes and their withdrawal, for one run.

    Args:
        ledger: the single writer.
        lease_seconds: how long a pair stays in one person's hands without renewal.
        inbox: folder where imported votes arrive.
    """

    def __init__(self, ledger: PreferenceLedger, *, lease_seconds: float = 600.0, inbox: Path | None = None) -> None:
        self._inbox = inbox
        self._ledger = ledger
        self._seconds = lease_seconds
        self._wanted = _Wanted()

    def want(self, pair_ids: Sequence[str], votes_per_pair: int) -> dict[str, Opinions]:
        """Set which pairs people are to judge, and by how many; returns those of which more is known than before."""
        self._take_in()
        with self._ledger.database.reading() as connection:
            newest = int(connection.scalar(select(func.max(labels.c.sequence))) or 0)
            changed = set(
                connection.scalars(
                    select(pairs.c.pair_id)
                    .join(labels, labels.c.plan_index == pairs.c.plan_index)
                    .where(labels.c.sequence > self._wanted.seen)
                )
            )
        fresh = [name for name in pair_ids if name in changed or name not in self._wanted.pair_ids]
        self._wanted = _Wanted(pair_ids=dict.fromkeys(pair_ids), votes_per_pair=votes_per_pair, seen=newest)
        return {pair_id: self.opinions(pair_id) for pair_id in fresh}

    def _take_in(self) -> None:
        """Keep the votes that were imported; pairs that this ledger does not hold are left out, and counted."""
        for file, votes in waiting_votes(self._inbox) if self._inbox is not None else ():
            strange = 0
            for vote in votes:
                try:
                    self._ledger.labels.vote(vote)
                except LedgerError:
                    strange += 1
            logger.info(
                "%s: %d labels taken in, %d of pairs that are not here", file.name, len(votes) - strange, strange
            )
            put_away(file)

    def opinions(self, pair_id: str) -> Opinions:
        """The votes and skips that count now."""
        events = self._ledger.labels.of(pair_id)
        if not events:
            return Opinions(pair_id=pair_id)
        current = max(event.sampling for event in events)
        events = [event for event in events if event.sampling == current]
        withdrawn = {event.withdraws for event in events if event.kind is LabelKind.WITHDRAWAL and not event.late}
        skips = [e for e in events if e.kind is LabelKind.SKIP and not e.late and e.sequence not in withdrawn]
        return Opinions(pair_id=pair_id, votes=tuple(effective_votes(events)), skips=tuple(skips))

    def take(self, annotator: str) -> Lease | None:
        """The pair in the annotator's hands, or the next one; None where nothing waits for them."""
        for lease in self._ledger.leases.open():
            if lease.holder == annotator:
                return lease
        if not self._wanted.pair_ids:
            return None
        found = self._ledger.leases.lease(
            annotator,
            seconds=self._seconds,
            votes_per_pair=self._wanted.votes_per_pair,
            among=list(self._wanted.pair_ids),
        )
        return found[0] if found else None

    def renew(self, lease_id: int, annotator: str) -> Lease:
        """A new deadline; raises LedgerError for a lease that has ended."""
        return self._ledger.leases.renew(lease_id, annotator, seconds=self._seconds)

    def release(self, lease_id: int, annotator: str) -> Lease:
        """Give the pair back unanswered."""
        return self._ledger.leases.release(lease_id, annotator)

    def answer(
        self,
        lease_id: int,
        pair_id: str,
        annotator: str,
        *,
        probability: float | None,
        details: str,
        reason: str | None = None,
        skip: bool = False,
    ) -> LabelEvent:
        """Keep an answer or a skip; on return it is on disk. The first answer to a lease is the one that is kept."""
        vote = Vote(
            key=f"lease-{lease_id}", pair_id=pair_id, annotator=annotator, probability=probability, source=HUMAN,
            reason=reason, lease_id=lease_id, details=details, skip=skip,
        )  # fmt: skip
        return self._ledger.labels.vote(vote)

    def undo(self, annotator: str) -> LabelEvent | None:
        """Take the annotator's newest standing answer back; None where there is none.

        The returned withdrawal is ``late``, and without effect, where the pair has been used already. An answer
        that is taken back comes to the same annotator again, before anything else.
        """
        with self._ledger.database.reading() as connection:
            taken_back = select(labels.c.withdraws).where(labels.c.withdraws.is_not(None))
            query = (
                select(labels.c.sequence, pairs.c.pair_id)
                .join(pairs, pairs.c.plan_index == labels.c.plan_index)
                .where(
                    labels.c.annotator == annotator,
                    labels.c.kind.in_([LabelKind.VOTE.value, LabelKind.SKIP.value]),
                    labels.c.sequence.not_in(taken_back),
                )
                .order_by(labels.c.sequence.desc())
                .limit(1)
            )
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        event = self._ledger.labels.withdraw(row.sequence, key=f"undo-{row.sequence}", annotator=annotator)
        if not event.late:
            for lease in self._ledger.leases.open():
                if lease.holder == annotator:
                    self._ledger.leases.release(lease.lease_id, annotator)
            self._ledger.leases.lease(
                annotator, seconds=self._seconds, votes_per_pair=self._wanted.votes_per_pair, among=[row.pair_id]
            )
        return event

    def requeue(self, annotator: str) -> int:
        """Take back every answer of an annotator that is not used yet; returns how many came back."""
        events = self.history(annotator=annotator)
        gone = {event.withdraws for event in events}
        standing = [e for e in events if e.kind is not LabelKind.WITHDRAWAL and e.sequence not in gone and not e.late]
        taken = [
            self._ledger.labels.withdraw(event.sequence, key=f"requeue-{event.sequence}", annotator=annotator)
            for event in standing
        ]
        return sum(not event.late for event in taken)

    def history(self, *, annotator: str | None = None) -> list[LabelEvent]:
        """The newest 5000 events by people, oldest first."""
        query = (
            select(labels, pairs.c.pair_id)
            .join(pairs, pairs.c.plan_index == labels.c.plan_index)
            .where(labels.c.annotator.is_not(None) if annotator is None else labels.c.annotator == annotator)
            .order_by(labels.c.sequence.desc())
            .limit(HISTORY)
        )
        with self._ledger.database.reading() as connection:
            rows = connection.execute(query).all()
            return [queries.label_event(row, row.pair_id) for row in reversed(rows)]

    def progress(self, annotator: str) -> Progress:
        """What one annotator has done."""
        mine = (labels.c.annotator == annotator) & labels.c.kind.in_([LabelKind.VOTE.value, LabelKind.SKIP.value])
        taken_back = select(labels.c.withdraws).where(labels.c.withdraws.is_not(None))
        standing = mine & labels.c.sequence.not_in(taken_back)
        times = select(labels.c.created_at).where(standing).order_by(labels.c.sequence.desc()).limit(PACE_ANSWERS)
        with self._ledger.database.reading() as connection:
            count = int(connection.scalar(select(func.count()).where(standing)) or 0)
            return Progress(answers=count, newest_at=tuple(connection.scalars(times)))

    def spent(self) -> dict[str, int]:
        """Labels that pairs carry, by source."""
        query = (
            select(labels.c.source, func.count())
            .join(pairs, pairs.c.label_sequence == labels.c.sequence)
            .group_by(labels.c.source)
        )
        with self._ledger.database.reading() as connection:
            return {str(source): int(count) for source, count in connection.execute(query)}

    def backlog(self) -> Backlog:
        """How much waits for people."""
        names = list(self._wanted.pair_ids)
        if not names:
            return Backlog()
        with self._ledger.database.reading() as connection:
            query = select(func.count(), func.min(pairs.c.sampled_at)).where(
                pairs.c.pair_id.in_(names), pairs.c.state == "sampled"
            )
            count, oldest = connection.execute(query).one()
        return Backlog(waiting=int(count), oldest_at=oldest, leased=len(self._ledger.leases.open()))
