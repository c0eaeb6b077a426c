"""The ledger for those who only look: reports, beside the running writer."""

from sqlalchemy import select

from pilaf_ray.errors import LedgerError
from pilaf_ray.store import codec, queries
from pilaf_ray.store.compaction import with_answers
from pilaf_ray.store.database import LedgerDatabase
from pilaf_ray.store.queries import CONTENTS
from pilaf_ray.store.records import LabelEvent, LedgerCounts
from pilaf_ray.store.tables import pairs
from pilaf_ray.types import LabeledPair, PairState


class LedgerReader:
    """A read-only view of one run's ledger; arguments as for the writer."""

    def __init__(self, url: str, *, namespace: str | None = None) -> None:
        self._database = LedgerDatabase(url, namespace=namespace, read_only=True)

    def close(self) -> None:
        """Release the database."""
        self._database.close()

    def counts(self) -> LedgerCounts:
        """How many pairs are where."""
        with self._database.reading() as connection:
            return queries.counts(connection)

    def times(self, pair_id: str) -> dict[PairState, int]:
        """When a pair came into each state of its way so far; UTC, milliseconds."""
        with self._database.reading() as connection:
            return queries.times(connection.execute(select(pairs).where(pairs.c.pair_id == pair_id)).one())

    def labels(self, pair_id: str) -> list[LabelEvent]:
        """Every label event of a pair, oldest first."""
        with self._database.reading() as connection:
            return queries.label_events(connection, pair_id)

    def trained_sample(self, count: int) -> list[LabeledPair]:
        """``count`` trained pairs, evenly spread over those of the run that have their answers."""
        trained = select(pairs.c.plan_index).where(pairs.c.state == PairState.TRAINED.value)
        with self._database.reading() as connection:
            indices = list(connection.scalars(with_answers(trained).order_by(pairs.c.plan_index)))
            shown = min(count, len(indices))
            wanted = [indices[len(indices) * k // shown] for k in range(shown)]
            rows = connection.execute(CONTENTS.where(pairs.c.plan_index.in_(wanted)).order_by(pairs.c.plan_index))
            return [codec.decode_labeled(row) for row in rows]

    def trained_at(self, step: int) -> list[LabeledPair]:
        """The batch of ``step``, in the order it was trained in; raises LedgerError where its answers were dropped."""
        query = CONTENTS.where(pairs.c.trained_step == step).order_by(pairs.c.plan_index)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        if any(row.response_a is None for row in rows):
            raise LedgerError(f"answers of step {step} were dropped (store.compact_after_steps): choose a later step")
        return [codec.decode_labeled(row) for row in rows]
