"""What may leave the ledger while a run goes on: the answers of pairs that nothing needs any more.

Dropped are rows of ``responses``, which are most of the file: token ids, log-probabilities and text. Never dropped are
pairs, plans, labels and leases, so counts, ages, costs and the label log stay whole; nor answers that people judged,
those in the reward model's replay window, and those that a checkpoint can bring back.
"""

from sqlalchemy import Connection, Select, and_, delete, exists, func, or_, select

from pilaf_ray.errors import LedgerError
from pilaf_ray.sampling.identity import is_held_out
from pilaf_ray.store import queries
from pilaf_ray.store.records import ENDED, HUMAN
from pilaf_ray.store.tables import labels, pairs, responses
from pilaf_ray.types import PairState

_PAGE = 1000
_HAS_ANSWERS = exists().where(responses.c.plan_index == pairs.c.plan_index)
_BY_PEOPLE = exists().where(
    labels.c.plan_index == pairs.c.plan_index, or_(labels.c.source == HUMAN, labels.c.annotator.is_not(None))
)


def drop_answers(
    connection: Connection, *, through_step: int, since: int, window_pairs: int = 0, held_out: float = 0.0
) -> tuple[int, int]:
    """Drop answers of pairs from plan index ``since`` on that were finished by step ``through_step``.

    Args:
        through_step: no checkpoint of an earlier step will be gone back to.
        since: everything below was looked at before.
        window_pairs: newest trained pairs that the reward model goes on with.
        held_out: the share of pairs that it does not train on, and that do not count.

    Returns:
        How many pairs lost their answers, and the plan index to go on from.
    """
    finished = or_(
        and_(pairs.c.state == PairState.TRAINED, pairs.c.trained_step <= through_step),
        # Without a version it was never sampled.
        and_(pairs.c.state.in_(ENDED), func.coalesce(pairs.c.max_version, 0) <= through_step),
    )
    unfinished = connection.scalar(select(func.min(pairs.c.plan_index)).where(pairs.c.plan_index >= since, ~finished))
    until = queries.next_plan_index(connection) if unfinished is None else int(unfinished)
    until = min(until, _window_start(connection, through_step, window_pairs, held_out))
    between = (pairs.c.plan_index >= since, pairs.c.plan_index < until)
    found = list(connection.scalars(select(pairs.c.plan_index).where(*between, _HAS_ANSWERS, ~_BY_PEOPLE)))
    for part in queries.chunks(found):
        connection.execute(delete(responses).where(responses.c.plan_index.in_(part)))
    return len(found), max(since, until)


def require_answers_after(connection: Connection, step: int) -> None:
    """Raises LedgerError where a checkpoint of ``step`` would bring pairs back whose answers are gone."""
    newest = connection.scalar(select(func.max(pairs.c.trained_step)).where(pairs.c.trained_step > step, ~_HAS_ANSWERS))
    if newest is not None:
        raise LedgerError(
            f"the run cannot go back to step {step}: answers of pairs up to step {newest} were dropped "
            "(store.compact_after_steps); put a checkpoint of that step or a later one back"
        )


def with_answers(found: Select[tuple[int]]) -> Select[tuple[int]]:
    """Those of the pairs that still have their answers."""
    return found.where(_HAS_ANSWERS)


def _window_start(connection: Connection, through_step: int, window_pairs: int, held_out: float) -> int:
    """Plan index of the oldest pair in the replay window of a run that goes back to ``through_step``."""
    trained = and_(pairs.c.state == PairState.TRAINED, pairs.c.trained_step <= through_step)
    newest = select(pairs.c.plan_index, pairs.c.pair_id).where(trained).order_by(pairs.c.plan_index.desc())
    start, left = queries.next_plan_index(connection), window_pairs
    for row in connection.execute(newest.execution_options(yield_per=_PAGE)) if window_pairs else ():
        if left == 0:
            break
        start, left = row.plan_index, left - (not is_held_out(row.pair_id, held_out))
    return start
