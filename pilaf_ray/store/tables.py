"""The ledger's tables.

``pairs`` is narrow, so that counting, paging and changing a state touch few bytes; what a pair is
made of stands in ``plans`` and ``responses``, written once. ``labels`` and ``leases`` are logs: rows
are added, and an event is never changed. Every table is keyed by the plan index, so new rows go to
the end of the file. Times are UTC in milliseconds.
"""

from sqlalchemy import BigInteger, Boolean, Float, ForeignKey, Index, Integer, LargeBinary, String, Table, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSION = 3

# SQLite gives numbers by itself only to a column of exactly this type.
_Sequence = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """Registry of the ledger's tables."""


class LedgerRow(Base):
    """One row: which layout the file has."""

    __tablename__ = "ledger"

    schema_version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)


class PairRow(Base):
    """Where a pair is in its life."""

    __tablename__ = "pairs"

    plan_index: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=False)
    pair_id: Mapped[str] = mapped_column(String(64), unique=True)
    state: Mapped[str] = mapped_column(String(12))
    branch: Mapped[str] = mapped_column(String(64))
    """The planned one; from SAMPLED on, the one that was taken."""
    sampling: Mapped[int] = mapped_column(Integer, default=0)
    """How often its responses were thrown away; labels of an earlier sampling speak of other responses."""
    min_version: Mapped[int | None] = mapped_column(Integer)
    max_version: Mapped[int | None] = mapped_column(Integer)
    label_sequence: Mapped[int | None] = mapped_column(_Sequence)
    """The label that it carries."""
    reference_a: Mapped[float | None] = mapped_column(Float)
    reference_b: Mapped[float | None] = mapped_column(Float)
    trained_step: Mapped[int | None] = mapped_column(Integer, index=True)
    reason: Mapped[str | None] = mapped_column(Text)
    """Why it ended untrained."""
    planned_at: Mapped[int] = mapped_column(BigInteger)
    sampled_at: Mapped[int | None] = mapped_column(BigInteger)
    labeled_at: Mapped[int | None] = mapped_column(BigInteger)
    trained_at: Mapped[int | None] = mapped_column(BigInteger)
    ended_at: Mapped[int | None] = mapped_column(BigInteger)

    # Pages of one state in plan order, and the count of each state.
    __table_args__ = (Index("pairs_by_state", "state", "plan_index"),)


class PlanRow(Base):
    """The plan of a pair, as :mod:`pilaf_ray.store.codec` writes it."""

    __tablename__ = "plans"

    plan_index: Mapped[int] = mapped_column(ForeignKey("pairs.plan_index"), primary_key=True, autoincrement=False)
    prompt: Mapped[str] = mapped_column(Text)
    """The prompt's text, to look at and to search; the plan holds it, too."""
    plan: Mapped[bytes] = mapped_column(LargeBinary)


class ResponseRow(Base):
    """Both responses of a sampled pair; gone when the weights that sampled them are."""

    __tablename__ = "responses"

    plan_index: Mapped[int] = mapped_column(ForeignKey("pairs.plan_index"), primary_key=True, autoincrement=False)
    response_a: Mapped[bytes] = mapped_column(LargeBinary)
    response_b: Mapped[bytes] = mapped_column(LargeBinary)
    draw: Mapped[bytes | None] = mapped_column(LargeBinary)
    """How they were drawn, where more than the two sides was."""


class LabelRow(Base):
    """One label event; see :mod:`pilaf_ray.store.labels`."""

    __tablename__ = "labels"

    sequence: Mapped[int] = mapped_column(_Sequence, primary_key=True)
    key: Mapped[str] = mapped_column(String(200), unique=True)
    """The same answer sent twice has the same key, and is one event."""
    plan_index: Mapped[int] = mapped_column(ForeignKey("pairs.plan_index"))
    sampling: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(String(12))
    source: Mapped[str] = mapped_column(String(64))
    annotator: Mapped[str | None] = mapped_column(String(64), index=True)
    probability: Mapped[float | None] = mapped_column(Float)
    reason: Mapped[str | None] = mapped_column(Text)
    reward_a: Mapped[float | None] = mapped_column(Float)
    reward_b: Mapped[float | None] = mapped_column(Float)
    withdraws: Mapped[int | None] = mapped_column(_Sequence)
    """The event that this one takes back."""
    details: Mapped[str | None] = mapped_column(Text)
    """What the annotator saw and chose, as JSON."""
    late: Mapped[bool] = mapped_column(Boolean)
    created_at: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (Index("labels_by_pair", "plan_index", "sequence"),)


class LeaseRow(Base):
    """A pair in the hands of a person; see :mod:`pilaf_ray.store.leases`."""

    __tablename__ = "leases"

    lease_id: Mapped[int] = mapped_column(_Sequence, primary_key=True)
    plan_index: Mapped[int] = mapped_column(ForeignKey("pairs.plan_index"))
    sampling: Mapped[int] = mapped_column(Integer)
    holder: Mapped[str] = mapped_column(String(64))
    granted_at: Mapped[int] = mapped_column(BigInteger)
    deadline: Mapped[int] = mapped_column(BigInteger)
    renewals: Mapped[int] = mapped_column(Integer, default=0)
    ended_at: Mapped[int | None] = mapped_column(BigInteger)
    outcome: Mapped[str | None] = mapped_column(String(12))

    __table_args__ = (
        Index("leases_by_pair", "plan_index"),
        Index("leases_open", "ended_at", "deadline"),
    )


class RewardUseRow(Base):
    """How often the reward model trained on a pair at one step of the run."""

    __tablename__ = "reward_uses"

    plan_index: Mapped[int] = mapped_column(ForeignKey("pairs.plan_index"), primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False, index=True)
    uses: Mapped[int] = mapped_column(Integer)


def _table(row: type[Base]) -> Table:
    assert isinstance(row.__table__, Table)
    return row.__table__


# The same tables for SQLAlchemy Core, which moves many rows in one statement.
ledger, pairs, plans, responses, labels, leases, reward_uses = (
    _table(row) for row in (LedgerRow, PairRow, PlanRow, ResponseRow, LabelRow, LeaseRow, RewardUseRow)
)
