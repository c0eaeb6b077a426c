"""The durable ledger of every pair, from plan to trained.

    PLANNED ──▶ SAMPLED ──▶ LABELED ──▶ TRAINED(step)
                        └─▶ ABSTAINED

Each method is one transaction. A repeat of an arrow that was already taken changes
nothing, so callers may retry; an arrow from any other state raises LedgerError.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import create_engine, event, func, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from pilaf_ray.errors import LedgerError
from pilaf_ray.store import codec
from pilaf_ray.store.tables import Base, PairRow
from pilaf_ray.types import (
    LabeledPair,
    PairPlan,
    PairState,
    PreferenceLabel,
    ReferenceLogprobs,
    ResponsePair,
)

_HUMAN = "human"
# An arrow was taken before if the pair stands at or beyond its target.
_PASSED = {
    PairState.SAMPLED: {PairState.SAMPLED, PairState.LABELED, PairState.TRAINED, PairState.ABSTAINED},
    PairState.LABELED: {PairState.LABELED, PairState.TRAINED},
    PairState.TRAINED: {PairState.TRAINED},
    PairState.ABSTAINED: {PairState.ABSTAINED},
}


def _durable(engine: Engine) -> None:
    """SQLite: readers beside the writer, and every commit on disk before it returns."""

    @event.listens_for(engine, "connect")
    def _pragmas(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()


class PreferenceLedger:
    """The single writer of one run's ledger; ``url`` is a SQLAlchemy URL."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            _durable(self._engine)
        Base.metadata.create_all(self._engine)

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        """All or nothing; a database that cannot write is one clear line."""
        try:
            with Session(self._engine) as session, session.begin():
                yield session
        except OperationalError as error:
            raise LedgerError(
                f"the ledger {self._engine.url} cannot be written ({error.orig}); is the disk full? Nothing that was "
                "acknowledged is lost: mend it and continue with --resume"
            ) from error

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def add_plans(self, plans: Sequence[PairPlan]) -> None:
        """Record new pairs as PLANNED."""
        with self._transaction() as session:
            known = self._rows(session, [plan.pair_id for plan in plans])
            for plan in plans:
                if plan.pair_id not in known:
                    session.add(
                        PairRow(
                            pair_id=plan.pair_id,
                            plan_index=plan.index,
                            state=PairState.PLANNED,
                            branch=plan.branch,
                            plan=codec.encode(plan),
                        )
                    )

    def add_responses(self, pairs: Sequence[ResponsePair]) -> None:
        """PLANNED → SAMPLED."""
        with self._transaction() as session:
            rows = self._rows(session, [pair.plan.pair_id for pair in pairs])
            for pair in pairs:
                row = rows.get(pair.plan.pair_id)
                if self._may_move(row, pair.plan.pair_id, PairState.PLANNED, PairState.SAMPLED):
                    assert row is not None
                    row.state = PairState.SAMPLED
                    row.response_a, row.response_b = codec.encode(pair.a), codec.encode(pair.b)
                    row.branch = pair.branch
                    row.draw = None if pair.draw is None else codec.encode(pair.draw)
                    row.min_version = pair.min_policy_version
                    row.max_version = max(pair.a.max_policy_version, pair.b.max_policy_version)

    def add_labels(self, labels: Sequence[PreferenceLabel], references: Sequence[ReferenceLogprobs]) -> None:
        """SAMPLED → LABELED, or → ABSTAINED where the oracle declined."""
        with self._transaction() as session:
            rows = self._rows(session, [label.pair_id for label in labels])
            for label, reference in zip(labels, references, strict=True):
                row = rows.get(label.pair_id)
                target = PairState.ABSTAINED if label.is_abstention else PairState.LABELED
                if self._may_move(row, label.pair_id, PairState.SAMPLED, target):
                    assert row is not None
                    row.state, row.reason = target, label.reason
                    row.label, row.label_source = codec.encode(label), label.source
                    row.reference = codec.encode(reference)

    def mark_trained(self, step: int, pair_ids: Sequence[str]) -> None:
        """LABELED → TRAINED(step)."""
        with self._transaction() as session:
            rows = self._rows(session, pair_ids)
            for pair_id in pair_ids:
                row = rows.get(pair_id)
                if self._may_move(row, pair_id, PairState.LABELED, PairState.TRAINED):
                    assert row is not None
                    row.state, row.trained_step = PairState.TRAINED, step
                elif row is not None and row.trained_step not in (step, None):
                    raise LedgerError(f"pair {pair_id} was already trained on at step {row.trained_step}, not {step}")

    def roll_back(self, step: int) -> int:
        """TRAINED after ``step`` → LABELED; returns how many pairs that were."""
        with self._transaction() as session:
            result = session.execute(
                update(PairRow)
                .where(PairRow.state == PairState.TRAINED, PairRow.trained_step > step)
                .values(state=PairState.LABELED, trained_step=None)
            )
            return int(result.rowcount)  # type: ignore[attr-defined]

    def reset_after(self, version: int) -> int:
        """Prepare a resumption from the checkpoint of step ``version``.

        Pairs trained after it become LABELED. Pairs whose responses were sampled under
        newer weights become PLANNED again, because those weights are gone and the same
        seeds will redo them; labels given by people are kept, and so are their pairs.
        Returns how many pairs went back to PLANNED.
        """
        self.roll_back(version)
        with self._transaction() as session:
            result = session.execute(
                update(PairRow)
                .where(
                    PairRow.max_version > version,
                    PairRow.state.in_([PairState.SAMPLED, PairState.LABELED, PairState.ABSTAINED]),
                    func.coalesce(PairRow.label_source, "") != _HUMAN,
                )
                .values(
                    state=PairState.PLANNED,
                    response_a=None,
                    response_b=None,
                    draw=None,
                    min_version=None,
                    max_version=None,
                    label=None,
                    label_source=None,
                    reference=None,
                    reason=None,
                )
            )
            return int(result.rowcount)  # type: ignore[attr-defined]

    def counts(self) -> dict[PairState, int]:
        """Number of pairs in each state, zeros included."""
        with Session(self._engine) as session:
            found = session.execute(select(PairRow.state, func.count()).group_by(PairRow.state)).all()
        return dict.fromkeys(PairState, 0) | {PairState(state): count for state, count in found}

    def unfinished(self) -> tuple[list[PairPlan], list[ResponsePair], list[LabeledPair]]:
        """PLANNED, SAMPLED and LABELED pairs, each in order of plan index."""
        planned: list[PairPlan] = []
        sampled: list[ResponsePair] = []
        labeled: list[LabeledPair] = []
        open_states = [PairState.PLANNED, PairState.SAMPLED, PairState.LABELED]
        query = select(PairRow).where(PairRow.state.in_(open_states)).order_by(PairRow.plan_index)
        with Session(self._engine) as session:
            for row in session.scalars(query):
                match row.state:
                    case PairState.PLANNED:
                        planned.append(codec.decode(PairPlan, row.plan))
                    case PairState.SAMPLED:
                        sampled.append(codec.decode_pair(row))
                    case _:
                        labeled.append(codec.decode_labeled(row))
        return planned, sampled, labeled

    def next_plan_index(self) -> int:
        """The index that the next new plan gets."""
        with Session(self._engine) as session:
            last = session.scalar(select(func.max(PairRow.plan_index)))
        return 0 if last is None else int(last) + 1

    @staticmethod
    def _rows(session: Session, pair_ids: Sequence[str]) -> dict[str, PairRow]:
        query = select(PairRow).where(PairRow.pair_id.in_(pair_ids))
        return {row.pair_id: row for row in session.scalars(query)}

    @staticmethod
    def _may_move(row: PairRow | None, pair_id: str, source: PairState, target: PairState) -> bool:
        """True to take the arrow, False where it was taken before; raises otherwise."""
        if row is None:
            raise LedgerError(f"pair {pair_id} is not in the ledger, so it cannot become {target}")
        if row.state == source:
            return True
        if row.state in _PASSED[target]:
            return False
        raise LedgerError(f"pair {pair_id} is {row.state}; only a {source} pair can become {target}")
