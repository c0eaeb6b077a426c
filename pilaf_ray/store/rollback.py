"""Going back: what a ledger forgets when a run resumes from an earlier step."""

from sqlalchemy import Connection, delete, exists, or_, select, update

from pilaf_ray.store import compaction, queries, reward_uses
from pilaf_ray.store.records import HUMAN
from pilaf_ray.store.tables import labels, pairs, responses
from pilaf_ray.types import PairState

# What a pair loses with its responses.
_FORGOTTEN = (
    *("min_version", "max_version", "label_sequence", "reference_a", "reference_b"),
    *("reason", "sampled_at", "labeled_at", "ended_at"),
)


def untrain_after(connection: Connection, step: int) -> int:
    """TRAINED after ``step`` → LABELED; returns how many pairs that were.

    Raises:
        LedgerError: answers of some of them were dropped.
    """
    compaction.require_answers_after(connection, step)
    reward_uses.forget_uses_after(connection, step)
    result = connection.execute(
        update(pairs)
        .where(pairs.c.trained_step > step)
        .values(state=PairState.LABELED.value, trained_step=None, trained_at=None)
    )
    return int(result.rowcount)


def forget_responses_after(connection: Connection, version: int) -> list[int]:
    """SAMPLED, LABELED or ABSTAINED under weights newer than ``version`` → PLANNED; returns their plan indices.

    Where people have answered, the pair and their labels are kept.
    """
    by_people = exists().where(
        labels.c.plan_index == pairs.c.plan_index,
        labels.c.sampling == pairs.c.sampling,
        or_(labels.c.source == HUMAN, labels.c.annotator.is_not(None)),
    )
    gone = list(
        connection.scalars(
            select(pairs.c.plan_index).where(
                pairs.c.max_version > version,
                pairs.c.state.in_([PairState.SAMPLED, PairState.LABELED, PairState.ABSTAINED]),
                ~by_people,
            )
        )
    )
    fresh = {**dict.fromkeys(_FORGOTTEN), "state": PairState.PLANNED.value, "sampling": pairs.c.sampling + 1}
    for part in queries.chunks(gone):
        connection.execute(delete(responses).where(responses.c.plan_index.in_(part)))
        connection.execute(update(pairs).where(pairs.c.plan_index.in_(part)).values(fresh))
    return gone
