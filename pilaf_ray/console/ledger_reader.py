"""The ledger as the console sees it: read-only, a page at a time, never a scan of everything."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, create_engine, event, func, select
from sqlalchemy.engine import Row
from sqlalchemy.orm import Session

from pilaf_ray.store import codec, queries
from pilaf_ray.store.tables import LabelRow, PairRow, PlanRow
from pilaf_ray.types import PairPlan, PairState, PreferenceLabel, ReferenceLogprobs, SampledResponse

PAGE = 50
WINDOW = 20_000
PARSED_WINDOW = 1_000
"""The same where each row's text must be read to know whether it matches."""
SEARCH_SECONDS = 0.12


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFilter:
    """Which pairs to show; an empty field matches all."""

    state: str = ""
    branch: str = ""
    source: str = ""
    min_age: int | None = None
    """Trained pairs that were at least so many steps old."""
    text: str = ""
    """Part of the prompt."""
    tie: bool = False
    """Pairs whose label is no clear preference: between ¼ and ¾."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSummary:
    """One row of the list of pairs."""

    pair_id: str
    index: int
    state: str
    branch: str
    source: str
    prompt: str
    probability: float | None
    age: int | None
    trained_step: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPage:
    """Pairs in falling order of their index, and where the next page begins."""

    pairs: Sequence[PairSummary]
    next_before: int | None
    """Index to go on below; None at the end."""
    complete: bool
    """False where the time for searching was over before the page was full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairDetail:
    """A pair and everything known of it."""

    plan: PairPlan
    state: str
    a: SampledResponse | None
    b: SampledResponse | None
    label: PreferenceLabel | None
    reference: ReferenceLogprobs | None
    trained_step: int | None
    reason: str | None
    times: dict[str, float] = field(default_factory=dict)


class LedgerReader:
    """Reads one run's ledger through a handle that cannot write.

    Args:
        path: the SQLite file; it need not exist yet.
        clock: for the time that a search may take.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._engine = create_engine(
            f"sqlite:///file:{path.resolve()}?mode=ro&uri=true", pool_size=8, max_overflow=32, pool_timeout=10
        )
        self._counts: dict[str, int] = {}
        self._counts_until = -1.0

        @event.listens_for(self._engine, "connect")
        def _read_only(connection: Any, _record: object) -> None:
            connection.execute("PRAGMA query_only=ON")

    @property
    def exists(self) -> bool:
        """Whether the run has a ledger yet."""
        return self._path.exists()

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def counts(self) -> dict[str, int]:
        """Pairs in each state; counted again once counting has become cheap beside the time since."""
        if self.exists and self._clock() >= self._counts_until:
            started = self._clock()
            with Session(self._engine) as session:
                found = session.execute(select(PairRow.state, func.count()).group_by(PairRow.state)).all()
            self._counts = {state.value: 0 for state in PairState} | {row[0]: int(row[1]) for row in found}
            ended = self._clock()
            self._counts_until = ended + max(1.0, 20 * (ended - started))
        return self._counts

    def ages(self, *, newest_step: int, steps: int) -> dict[int, int]:
        """Pairs by age in policy versions, over the last ``steps`` trained steps."""
        if not self.exists:
            return {}
        age = PairRow.trained_step - 1 - PairRow.min_version
        query = (
            select(age, func.count())
            .where(PairRow.trained_step > newest_step - steps, PairRow.min_version.is_not(None))
            .group_by(age)
        )
        with Session(self._engine) as session:
            return {int(row[0]): int(row[1]) for row in session.execute(query) if row[0] is not None}

    def page(self, wanted: PairFilter, *, before: int | None = None) -> PairPage:
        """The next page below index ``before``, from the newest pair on without it."""
        if not self.exists:
            return PairPage(pairs=(), next_before=None, complete=True)
        conditions = _conditions(wanted)
        with Session(self._engine) as session:
            newest = session.scalar(select(func.max(PairRow.plan_index)))
            if newest is None:
                return PairPage(pairs=(), next_before=None, complete=True)
            below = int(newest) + 1 if before is None else before
            found: list[Row[Any]] = []
            deadline = self._clock() + SEARCH_SECONDS
            # Windows of the index keep every query short, however rare a match is.
            window = PARSED_WINDOW if wanted.text or wanted.tie else WINDOW if conditions else PAGE + 1
            while below > 0 and len(found) <= PAGE and self._clock() < deadline:
                low = max(0, below - window)
                query = _columns().where(PairRow.plan_index >= low, PairRow.plan_index < below, *conditions)
                found += session.execute(query.order_by(PairRow.plan_index.desc()).limit(PAGE + 1 - len(found))).all()
                below = low
        if len(found) > PAGE:
            return PairPage(pairs=_summaries(found[:PAGE]), next_before=found[PAGE - 1].plan_index, complete=True)
        return PairPage(pairs=_summaries(found), next_before=below or None, complete=below == 0)

    def pair(self, pair_id: str) -> PairDetail | None:
        """One pair, None if there is none of that name."""
        if not self.exists:
            return None
        with Session(self._engine) as session:
            row = session.execute(queries.CONTENTS.where(PairRow.pair_id == pair_id)).one_or_none()
            if row is None:
                return None
            labeled = row.label_sequence is not None
            return PairDetail(
                plan=codec.decode(PairPlan, row.plan),
                state=row.state,
                a=codec.decode(SampledResponse, row.response_a) if row.response_a else None,
                b=codec.decode(SampledResponse, row.response_b) if row.response_b else None,
                label=codec.decode_label(row) if labeled else None,
                reference=codec.decode_reference(row) if labeled else None,
                trained_step=row.trained_step,
                reason=row.reason,
                times={state.value: when / 1000 for state, when in queries.times(row).items()},
            )


def _columns() -> Any:
    """What the list shows, the long texts left in the file."""
    return (
        select(
            PairRow.pair_id, PairRow.plan_index, PairRow.state, PairRow.branch, LabelRow.source,
            PairRow.trained_step, PairRow.min_version, func.substr(PlanRow.prompt, 1, 160).label("prompt"),
            LabelRow.probability,
        )
        .join(PlanRow, PlanRow.plan_index == PairRow.plan_index)
        .outerjoin(LabelRow, LabelRow.sequence == PairRow.label_sequence)
    )  # fmt: skip


def _conditions(wanted: PairFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.state:
        conditions.append(PairRow.state == wanted.state)
    if wanted.branch:
        conditions.append(PairRow.branch == wanted.branch)
    if wanted.source:
        conditions.append(LabelRow.source == wanted.source)
    if wanted.min_age is not None:
        conditions.append(PairRow.trained_step - 1 - PairRow.min_version >= wanted.min_age)
    if wanted.tie:
        conditions.append(LabelRow.probability.between(0.25, 0.75))
    if wanted.text:
        conditions.append(PlanRow.prompt.contains(wanted.text, autoescape=True))
    return conditions


def _summaries(rows: Sequence[Row[Any]]) -> list[PairSummary]:
    return [
        PairSummary(
            pair_id=row.pair_id,
            index=row.plan_index,
            state=row.state,
            branch=row.branch,
            source=row.source or "",
            prompt=row.prompt or "",
            probability=row.probability,
            age=None if row.trained_step is None or row.min_version is None else row.trained_step - 1 - row.min_version,
            trained_step=row.trained_step,
        )
        for row in rows
    ]
