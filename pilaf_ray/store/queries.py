"""Reads that the ledger's writer and its readers share; each takes an open connection."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, func, select

from pilaf_ray.errors import LedgerError
from pilaf_ray.store.records import LabelEvent, LabelKind, LedgerCounts
from pilaf_ray.store.tables import labels, pairs, plans, responses
from pilaf_ray.types import PairState

T = TypeVar("T")

CONTENTS = (
    select(
        pairs,
        plans.c.plan,
        plans.c.prompt,
        responses.c.response_a,
        responses.c.response_b,
        responses.c.draw,
        labels.c.probability,
        labels.c.source,
        labels.c.reward_a,
        labels.c.reward_b,
        labels.c.reason.label("label_reason"),
    )
    .join_from(pairs, plans, plans.c.plan_index == pairs.c.plan_index)
    .outerjoin(responses, responses.c.plan_index == pairs.c.plan_index)
    .outerjoin(labels, labels.c.sequence == pairs.c.label_sequence)
)
"""Everything of a pair, for :mod:`pilaf_ray.store.codec`."""

# Below the number of variables that any supported database takes in one statement.
_CHUNK = 1000


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Parts that fit one statement."""
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


def standing(connection: Connection, pair_ids: Sequence[str]) -> dict[str, Row[Any]]:
    """The narrow rows of the named pairs, locked where the database locks rows."""
    return {
        row.pair_id: row
        for part in chunks(pair_ids)
        for row in connection.execute(select(pairs).where(pairs.c.pair_id.in_(part)).with_for_update()).all()
    }


def one_pair(connection: Connection, pair_id: str) -> Row[Any]:
    """The narrow row of a pair; raises LedgerError where there is none."""
    row = standing(connection, [pair_id]).get(pair_id)
    if row is None:
        raise LedgerError(f"pair {pair_id} is not in the ledger")
    return row


def counts(connection: Connection) -> LedgerCounts:
    """How many pairs are where; both halves of one snapshot."""
    found = connection.execute(select(pairs.c.state, func.count()).group_by(pairs.c.state)).all()
    by_state = dict.fromkeys(PairState, 0) | {PairState(state): count for state, count in found}
    return LedgerCounts(planned=next_plan_index(connection), by_state=by_state)


def next_plan_index(connection: Connection) -> int:
    """The index that the next new plan gets."""
    last = connection.scalar(select(func.max(pairs.c.plan_index)))
    return 0 if last is None else int(last) + 1


def label_events(connection: Connection, pair_id: str) -> list[LabelEvent]:
    """The label log of one pair, oldest first."""
    query = (
        select(labels)
        .join(pairs, pairs.c.plan_index == labels.c.plan_index)
        .where(pairs.c.pair_id == pair_id)
        .order_by(labels.c.sequence)
    )
    return [label_event(row, pair_id) for row in connection.execute(query)]


def label_event(row: Row[Any], pair_id: str) -> LabelEvent:
    """The event in a row of ``labels``."""
    values = dict(row._mapping)
    for name in ("plan_index", "pair_id"):
        values.pop(name, None)
    return LabelEvent(pair_id=pair_id, **values | {"kind": LabelKind(row.kind)})


def times(row: Any) -> dict[PairState, int]:
    """When a pair came into each state of its way so far, from a row of ``pairs``; UTC, milliseconds."""
    way: dict[PairState, int | None] = {
        PairState.PLANNED: row.planned_at,
        PairState.SAMPLED: row.sampled_at,
        PairState.LABELED: row.labeled_at,
        PairState.TRAINED: row.trained_at,
    }
    if row.ended_at is not None:
        way[PairState(row.state)] = row.ended_at
    return {state: when for state, when in way.items() if when is not None}
