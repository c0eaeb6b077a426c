"""Leases: a pair that waits for a person is in one person's hands until a deadline, then free again.

    lease ──▶ open ──▶ ANSWERED (a vote came) | RELEASED (given back) | EXPIRED (deadline) | VOID (pair left)
               ↺ renew

The deadline itself ends a lease: the moment it has passed the pair may be leased to somebody else,
whether or not :meth:`LeaseBook.expire` has been called; that call only writes it down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, exists, func, insert, select, update

from pilaf_ray.errors import LedgerError
from pilaf_ray.store import queries
from pilaf_ray.store.database import LedgerDatabase
from pilaf_ray.store.records import LabelKind, Lease, LeaseOutcome, Vote
from pilaf_ray.store.tables import labels, pairs
from pilaf_ray.store.tables import leases as book
from pilaf_ray.types import PairState

_rows = select(book, pairs.c.pair_id).join(pairs, pairs.c.plan_index == book.c.plan_index)


class LeaseBook:
    """Who holds what. Times that come in are seconds, times that go out UTC milliseconds."""

    def __init__(self, database: LedgerDatabase) -> None:
        self._database = database

    def lease(
        self,
        holder: str,
        *,
        seconds: float,
        limit: int = 1,
        votes_per_pair: int = 1,
        among: Sequence[str] | None = None,
    ) -> list[Lease]:
        """Hand ``holder`` the first SAMPLED pairs, in plan order, that still need a vote.

        A pair is in so many hands, open leases and votes that count together, as it needs votes;
        and never twice in the same ones, nor in those that skipped it.

        Args:
            limit: at most so many pairs.
            votes_per_pair: votes of different annotators that a pair needs.
            among: only these pairs.
        """
        now = self._database.now()
        with self._database.writing() as connection:
            open_now = (book.c.plan_index == pairs.c.plan_index) & _open_at(now)
            taken = select(func.count()).select_from(book).where(open_now).correlate(pairs).scalar_subquery()
            votes, skips = _counting(LabelKind.VOTE), _counting(LabelKind.SKIP)
            answered = select(func.count(labels.c.annotator.distinct())).where(votes).correlate(pairs).scalar_subquery()
            query = (
                select(pairs.c.plan_index, pairs.c.pair_id, pairs.c.sampling)
                .where(
                    pairs.c.state == PairState.SAMPLED.value,
                    taken + answered < votes_per_pair,
                    ~exists().where(open_now, book.c.holder == holder),
                    ~exists().where(votes, labels.c.annotator == holder),
                    ~exists().where(skips, labels.c.annotator == holder),
                )
                .order_by(pairs.c.plan_index)
                .limit(limit)
                .with_for_update(of=pairs)
            )
            if among is not None:
                query = query.where(pairs.c.pair_id.in_(among))
            granted = [
                {"plan_index": row.plan_index, "sampling": row.sampling} for row in connection.execute(query).all()
            ]
            if not granted:
                return []
            fixed = {"holder": holder, "granted_at": now, "deadline": now + round(seconds * 1000), "renewals": 0}
            added = insert(book).values(fixed).returning(book.c.lease_id)
            numbers = list(connection.scalars(added, granted))
            found = connection.execute(_rows.where(book.c.lease_id.in_(numbers)).order_by(book.c.plan_index))
            return [_lease(row) for row in found]

    def renew(self, lease_id: int, holder: str, *, seconds: float) -> Lease:
        """Move the deadline to ``seconds`` from now; raises LedgerError for a lease that has ended."""
        now = self._database.now()
        with self._database.writing() as connection:
            row = _one(connection, lease_id, holder)
            if not _is_open(row, now):
                raise LedgerError(f"lease {lease_id} of pair {row.pair_id} has ended ({_end(row)}): take a new one")
            changed = update(book).where(book.c.lease_id == lease_id)
            connection.execute(changed.values(deadline=now + round(seconds * 1000), renewals=book.c.renewals + 1))
            return _lease(_one(connection, lease_id, holder))

    def release(self, lease_id: int, holder: str) -> Lease:
        """Give a pair back; a lease that has ended stays as it ended."""
        now = self._database.now()
        with self._database.writing() as connection:
            row = _one(connection, lease_id, holder)
            if row.ended_at is None:
                outcome = LeaseOutcome.RELEASED if _is_open(row, now) else LeaseOutcome.EXPIRED
                _close(connection, [lease_id], outcome, now)
            return _lease(_one(connection, lease_id, holder))

    def expire(self) -> list[Lease]:
        """Write down which leases their deadline has ended since the last call; returns those."""
        now = self._database.now()
        with self._database.writing() as connection:
            due = select(book.c.lease_id).where(book.c.ended_at.is_(None), book.c.deadline <= now)
            numbers = list(connection.scalars(due))
            _close(connection, numbers, LeaseOutcome.EXPIRED, now)
            return [
                _lease(row)
                for part in queries.chunks(numbers)
                for row in connection.execute(_rows.where(book.c.lease_id.in_(part)).order_by(book.c.lease_id))
            ]

    def open(self) -> list[Lease]:
        """Leases that are in force now, the earliest deadline first."""
        now = self._database.now()
        with self._database.reading() as connection:
            found = connection.execute(_rows.where(_open_at(now)).order_by(book.c.deadline, book.c.lease_id))
            return [_lease(row) for row in found]

    @staticmethod
    def void(connection: Connection, plan_indices: Sequence[int], now: int) -> None:
        """End the open leases of pairs that left SAMPLED, inside the caller's transaction."""
        for part in queries.chunks(plan_indices):
            still_open = update(book).where(book.c.plan_index.in_(part), book.c.ended_at.is_(None))
            connection.execute(still_open.values(ended_at=now, outcome=LeaseOutcome.VOID.value))


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredLease:
    """What a vote needs to know of its lease."""

    sampling: int
    in_time: bool


def answer(connection: Connection, vote: Vote, now: int) -> AnsweredLease:
    """End the lease that ``vote`` answers; raises LedgerError where it is not the annotator's, or of another pair."""
    assert vote.lease_id is not None
    row = _one(connection, vote.lease_id, vote.annotator)
    if row.pair_id != vote.pair_id:
        raise LedgerError(f"lease {vote.lease_id} is of pair {row.pair_id}, not of {vote.pair_id}")
    in_time = _is_open(row, now)
    if row.ended_at is None:
        _close(connection, [vote.lease_id], LeaseOutcome.ANSWERED if in_time else LeaseOutcome.EXPIRED, now)
    return AnsweredLease(sampling=row.sampling, in_time=in_time)


def _counting(kind: LabelKind) -> Any:
    """Condition: an event of ``kind`` on the pair at hand that came in time and was not withdrawn."""
    later = labels.alias("later")
    withdrawn = exists().where(later.c.withdraws == labels.c.sequence, later.c.plan_index == labels.c.plan_index)
    return (
        (labels.c.plan_index == pairs.c.plan_index)
        & (labels.c.sampling == pairs.c.sampling)
        & (labels.c.kind == kind.value)
        & ~labels.c.late
        & ~withdrawn
    )


def _open_at(now: int) -> Any:
    return book.c.ended_at.is_(None) & (book.c.deadline > now)


def _is_open(row: Row[Any], now: int) -> bool:
    return row.ended_at is None and row.deadline > now


def _one(connection: Connection, lease_id: int, holder: str) -> Row[Any]:
    row = connection.execute(_rows.where(book.c.lease_id == lease_id)).one_or_none()
    if row is None or row.holder != holder:
        raise LedgerError(f"{holder} has no lease {lease_id}")
    return row


def _close(connection: Connection, numbers: Sequence[int], outcome: LeaseOutcome, now: int) -> None:
    for part in queries.chunks(numbers):
        ended = update(book).where(book.c.lease_id.in_(part))
        connection.execute(ended.values(ended_at=now, outcome=outcome.value))


def _end(row: Row[Any]) -> str:
    return row.outcome or LeaseOutcome.EXPIRED


def _lease(row: Row[Any]) -> Lease:
    return Lease(
        lease_id=row.lease_id,
        pair_id=row.pair_id,
        holder=row.holder,
        granted_at=row.granted_at,
        deadline=row.deadline,
        renewals=row.renewals,
        outcome=None if row.outcome is None else LeaseOutcome(row.outcome),
    )
