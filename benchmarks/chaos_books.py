"""What a run's files say of its pairs and labels, checked against each other."""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_TRAINED = "select trained_step, count(*) from pairs where state = 'trained' group by trained_step"
# A pair that should carry a label and does not; a label of the pair's present responses that the pair does not carry.
_LOST = """
    select pair_id from pairs where state in ('labeled', 'trained') and
        (label_sequence is null or label_sequence not in (select sequence from labels))
    union select pairs.pair_id from pairs join labels using (plan_index)
        where labels.kind = 'verdict' and labels.sampling = pairs.sampling and state in ('planned', 'sampled')
"""
_DOUBLED = """
    select pair_id || ', sampling ' || labels.sampling from labels join pairs using (plan_index)
        where kind = 'verdict' group by plan_index, labels.sampling having count(*) > 1
    union select pair_id || ' twice' from pairs group by pair_id having count(*) > 1
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """What the run's files say; every list names what should not be."""

    steps: int
    trained: int
    labels_lost: list[str] = field(default_factory=list)
    counted_twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLook:
    """The ledger at one moment of a run."""

    labels: int
    """Events of the log, which only grows."""
    resampled: int
    """How often responses were thrown away and sampled again."""
    labels_lost: list[str]
    counted_twice: list[str]


class RunFiles(Protocol):
    """A run's folder and its steps."""

    path: Path

    def steps(self) -> list[int]: ...


def look(run: Path) -> LedgerLook:
    """One snapshot, beside the writer; empty before there is a ledger."""
    file = run / "preferences.db"
    if not file.exists():
        return LedgerLook(labels=0, resampled=0, labels_lost=[], counted_twice=[])
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30, isolation_level=None)) as ledger:
        ledger.execute("begin")
        ((labels,),) = ledger.execute("select count(*) from labels").fetchall()
        ((resampled,),) = ledger.execute("select coalesce(sum(sampling), 0) from pairs").fetchall()
        return LedgerLook(
            labels=labels,
            resampled=resampled,
            labels_lost=[row[0] for row in ledger.execute(_LOST)],
            counted_twice=[row[0] for row in ledger.execute(_DOUBLED)],
        )


def read_books(job: RunFiles, *, batch_pairs: int | None = None) -> Books:
    """Check the ended run's files against each other; ``batch_pairs`` is read from its configuration."""
    if batch_pairs is None:
        batch_pairs = json.loads((job.path / "config.json").read_text())["learner"]["batch_pairs"]
    steps = job.steps()
    wrong = [] if steps == list(range(1, len(steps) + 1)) else [f"steps are {steps}"]
    with closing(sqlite3.connect(job.path / "preferences.db")) as ledger:

        def ask(query: str) -> list[tuple[Any, ...]]:
            return ledger.execute(query).fetchall()

        by_step = dict(ask(_TRAINED))
        ((planned, rows),) = ask("select max(plan_index) + 1, count(*) from pairs")
    wrong += [f"step {s} trained {by_step.get(s, 0)} pairs" for s in steps if by_step.get(s) != batch_pairs]
    wrong += [f"{by_step[s]} pairs trained at step {s}, which is not there" for s in by_step.keys() - set(steps)]
    if planned != rows:
        wrong.append(f"{planned} pairs planned, {rows} in the ledger")
    found = look(job.path)
    return Books(
        steps=len(steps),
        trained=sum(by_step.values()),
        labels_lost=found.labels_lost,
        counted_twice=found.counted_twice,
        wrong=wrong,
    )
