"""Pairs of a ledger as plain records, one a pair, in plan order."""

from collections.abc import Iterator
from dataclasses import dataclass

from pilaf_ray.errors import LedgerError
from pilaf_ray.store import codec
from pilaf_ray.store.database import LedgerDatabase
from pilaf_ray.store.queries import CONTENTS
from pilaf_ray.store.tables import pairs
from pilaf_ray.types import PairState

BATCH = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecord:
    """What leaves the ledger: texts, the label and where both come from."""

    pair_id: str
    plan_index: int
    state: str
    branch: str
    prompt: str
    response_a: str
    response_b: str
    coefficient_a: float
    coefficient_b: float
    probability: float | None
    """P(a ≻ b); None where there is no label."""
    label_source: str | None
    reward_a: float | None
    reward_b: float | None
    reference_logprob_a: float | None
    reference_logprob_b: float | None
    min_policy_version: int
    max_policy_version: int
    trained_step: int | None


def pair_records(
    database: LedgerDatabase, *, states: tuple[PairState, ...], kept: bool = False
) -> Iterator[PairRecord]:
    """Every sampled pair in one of ``states``, read a thousand at a time.

    Args:
        kept: leave out pairs whose answers were dropped.

    Raises:
        LedgerError: there are such pairs, and they are not to be left out.
    """
    after = -1
    names = [state.value for state in states]
    while True:
        query = (
            CONTENTS.where(pairs.c.plan_index > after, pairs.c.state.in_(names), pairs.c.sampled_at.is_not(None))
            .order_by(pairs.c.plan_index)
            .limit(BATCH)
        )
        with database.reading() as connection:
            rows = connection.execute(query).all()
        for row in rows:
            if row.response_a is None and kept:
                continue
            if row.response_a is None:
                raise LedgerError(
                    f"answers of pair {row.pair_id} were dropped (store.compact_after_steps): "
                    "add --kept to export the pairs that have theirs"
                )
            pair = codec.decode_pair(row)
            yield PairRecord(
                pair_id=row.pair_id,
                plan_index=row.plan_index,
                state=row.state,
                branch=row.branch,
                prompt=pair.plan.prompt.text,
                response_a=pair.a.text,
                response_b=pair.b.text,
                coefficient_a=pair.a.coefficient,
                coefficient_b=pair.b.coefficient,
                probability=row.probability,
                label_source=row.source,
                reward_a=row.reward_a,
                reward_b=row.reward_b,
                reference_logprob_a=row.reference_a,
                reference_logprob_b=row.reference_b,
                min_policy_version=row.min_version,
                max_policy_version=row.max_version,
                trained_step=row.trained_step,
            )
        if len(rows) < BATCH:
            return
        after = rows[-1].plan_index
