"""The ledger as the console sees it: read-only, a page at a time, never a scan of everything."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Row, exists, func, select

from pilaf_ray.store import codec, queries
from pilaf_ray.store.database import LedgerDatabase
from pilaf_ray.store.queries import CONTENTS
from pilaf_ray.store.records import LabelEvent, LabelKind
from pilaf_ray.store.tables import labels, pairs, plans
from pilaf_ray.types import PairPlan, PairState, PreferenceLabel, ReferenceLogprobs, ResponsePair

PAGE = 50
WINDOW = 20_000
SEARCH_WINDOW = 4_000
"""The same where each prompt's text is looked at."""
SEARCH_SECONDS = 0.12
COUNTING_PAUSE = 200
"""A count of all pairs is followed by so many times its own duration without one."""


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
    disagreement: bool = False
    """Pairs on which annotators took different sides."""


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
    branch: str
    sampling: int
    pair: ResponsePair | None
    label: PreferenceLabel | None
    reference: ReferenceLogprobs | None
    trained_step: int | None
    reason: str | None
    times: dict[PairState, int] = field(default_factory=dict)
    """When it came into each state; UTC, milliseconds."""
    events: Sequence[LabelEvent] = ()


class LedgerReader:
    """Reads one run's ledger through a handle that cannot write.

    Args:
        url: SQLAlchemy URL; a SQLite file need not exist yet.
        namespace: of the run, where runs share a database.
        clock: for the time that a search may take.
    """

    def __init__(self, url: str, *, namespace: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._namespace, self._clock = url, namespace, clock
        self._counts: dict[str, int] = {}
        self._counts_until = -1.0

    @property
    def exists(self) -> bool:
        """Whether the run has a ledger yet."""
        return not self._url.startswith("sqlite:///") or Path(self._url.removeprefix("sqlite:///")).exists()

    @cached_property
    def database(self) -> LedgerDatabase:
        """The open database; LedgerError where it cannot be read."""
        return LedgerDatabase(self._url, namespace=self._namespace, read_only=True)

    def close(self) -> None:
        """Release the database."""
        if "database" in self.__dict__:
            self.database.close()

    def counts(self) -> dict[str, int]:
        """Pairs in each state; counted again once that has cost no more than half a per cent of the time since."""
        if self.exists and self._clock() >= self._counts_until:
            started = self._clock()
            # Whoever comes meanwhile gets the older counts instead of counting, too.
            self._counts_until = started + 60
            with self.database.reading() as connection:
                found = queries.counts(connection)
            self._counts = {state.value: count for state, count in found.by_state.items()}
            ended = self._clock()
            self._counts_until = ended + max(1.0, COUNTING_PAUSE * (ended - started))
        return self._counts

    def ages(self, *, newest_step: int, steps: int) -> dict[int, int]:
        """Pairs by age in policy versions, over the last ``steps`` trained steps."""
        if not self.exists:
            return {}
        age = pairs.c.trained_step - 1 - pairs.c.min_version
        query = (
            select(age, func.count())
            .where(pairs.c.trained_step > newest_step - steps, pairs.c.min_version.is_not(None))
            .group_by(age)
        )
        with self.database.reading() as connection:
            return {int(row[0]): int(row[1]) for row in connection.execute(query) if row[0] is not None}

    def page(self, wanted: PairFilter, *, before: int | None = None) -> PairPage:
        """The next page below index ``before``, from the newest pair on without it."""
        if not self.exists:
            return PairPage(pairs=(), next_before=None, complete=True)
        conditions = _conditions(wanted)
        with self.database.reading() as connection:
            below = queries.next_plan_index(connection) if before is None else before
            found: list[Any] = []
            deadline = self._clock() + SEARCH_SECONDS
            # Windows of the index keep every query short, however rare a match is.
            window = SEARCH_WINDOW if wanted.text else WINDOW if conditions else PAGE + 1
            while below > 0 and len(found) <= PAGE and self._clock() < deadline:
                low = max(0, below - window)
                query = _COLUMNS.where(pairs.c.plan_index >= low, pairs.c.plan_index < below, *conditions)
                query = query.order_by(pairs.c.plan_index.desc()).limit(PAGE + 1 - len(found))
                found += connection.execute(query).all()
                below = low
        if len(found) > PAGE:
            return PairPage(pairs=_summaries(found[:PAGE]), next_before=found[PAGE - 1].plan_index, complete=True)
        return PairPage(pairs=_summaries(found), next_before=below or None, complete=below == 0)

    def pair(self, pair_id: str) -> PairDetail | None:
        """One pair, None if there is none of that name."""
        if not self.exists:
            return None
        with self.database.reading() as connection:
            row = connection.execute(CONTENTS.where(pairs.c.pair_id == pair_id)).one_or_none()
            if row is None:
                return None
            return PairDetail(
                plan=codec.decode(PairPlan, row.plan),
                state=row.state,
                branch=row.branch,
                sampling=row.sampling,
                pair=codec.decode_pair(row) if row.response_a is not None else None,
                label=codec.decode_label(row) if row.label_sequence is not None else None,
                reference=codec.decode_reference(row) if row.reference_a is not None else None,
                trained_step=row.trained_step,
                reason=row.reason,
                times=queries.times(row),
                events=queries.label_events(connection, pair_id),
            )


_COLUMNS = (
    select(
        *(pairs.c.pair_id, pairs.c.plan_index, pairs.c.state, pairs.c.branch, pairs.c.trained_step),
        *(pairs.c.min_version, func.substr(plans.c.prompt, 1, 160).label("prompt")),
        *(labels.c.source, labels.c.probability),
    )
    .join_from(pairs, plans, plans.c.plan_index == pairs.c.plan_index)
    .outerjoin(labels, labels.c.sequence == pairs.c.label_sequence)
)
"""What the list shows, the long texts left in the file."""


def _conditions(wanted: PairFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.state:
        conditions.append(pairs.c.state == wanted.state)
    if wanted.branch:
        conditions.append(pairs.c.branch == wanted.branch)
    if wanted.source:
        conditions.append(labels.c.source == wanted.source)
    if wanted.min_age is not None:
        conditions.append(pairs.c.trained_step - 1 - pairs.c.min_version >= wanted.min_age)
    if wanted.tie:
        conditions.append(labels.c.probability.between(0.25, 0.75))
    if wanted.disagreement:
        log = labels.alias("log")
        on_pair = (log.c.plan_index == pairs.c.plan_index) & (log.c.kind == LabelKind.VOTE.value)
        conditions.append(exists().where(on_pair, log.c.probability > 0.5))
        conditions.append(exists().where(on_pair, log.c.probability < 0.5))
    if wanted.text:
        conditions.append(plans.c.prompt.contains(wanted.text, autoescape=True))
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
