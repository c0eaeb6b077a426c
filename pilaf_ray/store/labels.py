"""The log of label events: what was said of which pair, by whom and when. Rows are only ever added.

A *verdict* is the label that a pair carries; the ledger appends it in the transaction that moves
the pair. A *vote* is one annotator's answer to a pair that waits for one or more of them; a *skip* leaves
the pair to other annotators. What comes when its pair no longer waits is kept and marked as late.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select

from pilaf_ray.errors import LedgerError
from pilaf_ray.store import leases, queries
from pilaf_ray.store.database import LedgerDatabase
from pilaf_ray.store.records import LabelEvent, LabelKind, Vote
from pilaf_ray.store.tables import labels, pairs
from pilaf_ray.types import PairState

# The key says whose number is whose: to keep the order of rows SQLAlchemy would insert them one by one into SQLite.
_append = insert(labels).returning(labels.c.key, labels.c.sequence)


class LabelLog:
    """Votes and verdicts of one ledger."""

    def __init__(self, database: LedgerDatabase) -> None:
        self._database = database

    def vote(self, vote: Vote) -> LabelEvent:
        """Keep an answer; on return it is on disk. A repeat of its key gives the event that is there.

        Raises:
            LedgerError: no such pair or lease, or the key belongs to another answer.
        """
        now = self._database.now()
        with self._database.writing() as connection:
            known = self._known(connection, vote.key, pair_id=vote.pair_id, annotator=vote.annotator)
            if known is not None:
                return known
            pair = queries.one_pair(connection, vote.pair_id)
            sampling, on_time = pair.sampling, pair.state == PairState.SAMPLED
            if vote.lease_id is not None:
                lease = leases.answer(connection, vote, now)
                sampling, on_time = lease.sampling, on_time and lease.in_time and lease.sampling == pair.sampling
            values = {
                "key": vote.key,
                "plan_index": pair.plan_index,
                "sampling": sampling,
                "kind": (LabelKind.SKIP if vote.skip else LabelKind.VOTE).value,
                "source": vote.source,
                "annotator": vote.annotator,
                "probability": vote.probability,
                "reason": vote.reason,
                "reward_a": None,
                "reward_b": None,
                "withdraws": None,
                "details": vote.details,
                "late": not on_time,
                "created_at": now,
            }
            return self._appended(connection, values, vote.pair_id)

    def withdraw(self, sequence: int, *, key: str, annotator: str, reason: str | None = None) -> LabelEvent:
        """Take a vote back, e.g. by undo; of no effect, and marked as late, once the pair has left SAMPLED.

        Raises:
            LedgerError: there is no such vote, or it is another annotator's.
        """
        now = self._database.now()
        with self._database.writing() as connection:
            query = (
                select(labels, pairs.c.pair_id, pairs.c.state, pairs.c.sampling.label("current"))
                .join(pairs, pairs.c.plan_index == labels.c.plan_index)
                .where(labels.c.sequence == sequence)
            )
            row = connection.execute(query).one_or_none()
            if row is None or row.kind not in (LabelKind.VOTE, LabelKind.SKIP) or row.annotator != annotator:
                raise LedgerError(f"label event {sequence} is no vote of {annotator}: only its giver may withdraw it")
            known = self._known(connection, key, pair_id=row.pair_id, annotator=annotator)
            if known is not None:
                return known
            values = {
                "key": key,
                "plan_index": row.plan_index,
                "sampling": row.sampling,
                "kind": LabelKind.WITHDRAWAL.value,
                "source": row.source,
                "annotator": annotator,
                "probability": None,
                "reason": reason,
                "reward_a": None,
                "reward_b": None,
                "withdraws": sequence,
                "details": None,
                "late": row.state != PairState.SAMPLED or row.current != row.sampling,
                "created_at": now,
            }
            return self._appended(connection, values, row.pair_id)

    def of(self, pair_id: str) -> list[LabelEvent]:
        """Every event of a pair, oldest first."""
        with self._database.reading() as connection:
            return queries.label_events(connection, pair_id)

    def votes(self, pair_id: str) -> list[LabelEvent]:
        """The votes that count now: the last one of each annotator that came in time and was not withdrawn."""
        with self._database.reading() as connection:
            events = queries.label_events(connection, pair_id)
            current = queries.one_pair(connection, pair_id).sampling
        return effective_votes([event for event in events if event.sampling == current])

    @staticmethod
    def append(connection: Connection, events: Sequence[Mapping[str, Any]]) -> list[int]:
        """Add events inside the caller's transaction; returns their numbers, in order."""
        numbers = {row.key: row.sequence for row in connection.execute(_append, list(events)).all()}
        return [numbers[event["key"]] for event in events]

    def _appended(self, connection: Connection, values: Mapping[str, Any], pair_id: str) -> LabelEvent:
        sequence = self.append(connection, [values])[0]
        row = connection.execute(select(labels).where(labels.c.sequence == sequence)).one()
        return queries.label_event(row, pair_id)

    @staticmethod
    def _known(connection: Connection, key: str, *, pair_id: str, annotator: str) -> LabelEvent | None:
        """The event that has this key already; it must be the same annotator's, of the same pair."""
        query = (
            select(labels, pairs.c.pair_id)
            .join(pairs, pairs.c.plan_index == labels.c.plan_index)
            .where(labels.c.key == key)
        )
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if (row.pair_id, row.annotator) != (pair_id, annotator):
            raise LedgerError(f"the key '{key}' belongs to another label: make a new key for each answer")
        event = connection.execute(select(labels).where(labels.c.sequence == row.sequence)).one()
        return queries.label_event(event, row.pair_id)


def effective_votes(events: Sequence[LabelEvent]) -> list[LabelEvent]:
    """Of one sampling's events, in order: the last vote of each annotator, late and withdrawn ones left out."""
    withdrawn = {event.withdraws for event in events if event.kind is LabelKind.WITHDRAWAL and not event.late}
    latest: dict[str, LabelEvent] = {}
    for event in events:
        if event.kind is LabelKind.VOTE and not event.late and event.sequence not in withdrawn:
            assert event.annotator is not None, "a vote has an annotator"
            latest[event.annotator] = event
    return list(latest.values())
