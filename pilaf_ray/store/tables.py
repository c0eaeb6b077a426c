"""The ledger's table. One row a pair; typed messages are stored as JSON."""

from sqlalchemy import Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Registry of the ledger's tables."""


class PairRow(Base):
    """A pair and everything known of it."""

    __tablename__ = "pairs"

    pair_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    plan_index: Mapped[int] = mapped_column(Integer, unique=True)
    state: Mapped[str] = mapped_column(String(12), index=True)
    branch: Mapped[str] = mapped_column(String(64))
    plan: Mapped[str] = mapped_column(Text)
    response_a: Mapped[str | None] = mapped_column(Text)
    response_b: Mapped[str | None] = mapped_column(Text)
    draw: Mapped[str | None] = mapped_column(Text)
    min_version: Mapped[int | None] = mapped_column(Integer)
    max_version: Mapped[int | None] = mapped_column(Integer)
    label: Mapped[str | None] = mapped_column(Text)
    label_source: Mapped[str | None] = mapped_column(String(64))
    reference: Mapped[str | None] = mapped_column(Text)
    trained_step: Mapped[int | None] = mapped_column(Integer, index=True)
    reason: Mapped[str | None] = mapped_column(Text)
