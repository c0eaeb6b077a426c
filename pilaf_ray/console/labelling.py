"""What an annotator is shown and what becomes of an answer; no HTTP in here."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from markdown_it import MarkdownIt
from markupsafe import Markup

from pilaf_ray.config.oracle import Choice, HumanOracleConfig
from pilaf_ray.console.desk_access import DeskAccess
from pilaf_ray.console.gold import FIRST_NUMBER, GoldBook, load_gold
from pilaf_ray.console.ledger_reader import LedgerReader
from pilaf_ray.errors import LedgerError
from pilaf_ray.store.desk import Backlog, Progress

MAX_TEXT = 2000
BUTTONS: tuple[tuple[Choice, str, str], ...] = (
    ("a_much", "1", "A much better"),
    ("a", "2", "A better"),
    ("a_slightly", "3", "A slightly better"),
    ("equal", "4", "about equal"),
    ("b_slightly", "5", "B slightly better"),
    ("b", "6", "B better"),
    ("b_much", "7", "B much better"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Two answers side by side, without a word on where they come from."""

    number: int
    """Of the lease, or of a gold question."""
    pair_id: str
    prompt: str
    left: str
    right: str
    b_first: bool
    deadline: float | None
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came from the page."""

    number: int
    pair_id: str
    choice: Choice | None
    """None is a skip."""
    reason: str = ""
    seconds: float | None = None
    aspects: tuple[tuple[str, str, int], ...] = ()
    """(aspect, side as shown: left or right, 1 to 5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What became of an answer."""

    sequence: int | None
    late: bool = False


def shows_b_first(pair_id: str, annotator: str) -> bool:
    """Which side stands on the left, drawn by lot for each pair and annotator."""
    return bool(hashlib.sha256(f"order/{pair_id}/{annotator}".encode()).digest()[0] & 1)


class Labelling:
    """The labelling of one run.

    Args:
        folder: of the run; answers to gold questions are kept there.
    """

    def __init__(self, settings: HumanOracleConfig, desk: DeskAccess, ledger: LedgerReader, folder: Path) -> None:
        self.settings = settings
        self.desk = desk
        self._ledger = ledger
        gold = settings.gold
        questions = load_gold(Path(gold.path)) if gold else []
        self.gold = GoldBook(folder / "gold_answers.jsonl", questions, share=gold.share if gold else 0.0)
        text = settings.guidelines
        if text.endswith(".md") and Path(text).is_file():
            text = Path(text).read_text()
        # Raw HTML in the guidelines is shown as text.
        self.guidelines = Markup(MarkdownIt("commonmark", {"html": False}).render(text))

    async def task(self, annotator: str) -> Task | None:
        """What the annotator has in hand or gets next; None where nothing waits."""
        progress = await self.desk.progress(annotator)
        question = self.gold.next_for(annotator, answers=progress.answers)
        if question is not None:
            name = f"gold-{question.number}"
            b_first = shows_b_first(name, annotator)
            left, right = (question.b, question.a) if b_first else (question.a, question.b)
            return Task(number=question.number, pair_id=name, prompt=question.prompt, left=left, right=right,
                        b_first=b_first, deadline=None)  # fmt: skip
        lease = await self.desk.take(annotator)
        if lease is None:
            return None
        detail = self._ledger.pair(lease.pair_id)
        assert detail is not None and detail.pair is not None, "a leased pair has responses"
        pair, b_first = detail.pair, shows_b_first(lease.pair_id, annotator)
        left, right = (pair.b.text, pair.a.text) if b_first else (pair.a.text, pair.b.text)
        return Task(number=lease.lease_id, pair_id=lease.pair_id, prompt=pair.plan.prompt.text, left=left,
                    right=right, b_first=b_first, deadline=lease.deadline / 1000)  # fmt: skip

    async def answer(self, annotator: str, answer: Answer) -> Kept:
        """Keep an answer; on return it is on disk. Raises LedgerError for a lease that is not the annotator's."""
        b_first = shows_b_first(answer.pair_id, annotator)
        probability = None
        if answer.choice is not None:
            left = self.settings.choices[answer.choice]
            probability = left if left is None or not b_first else 1.0 - left
        details = json.dumps(
            {
                "choice": answer.choice or "skip",
                "shown_first": "b" if b_first else "a",
                "seconds": answer.seconds,
                "aspects": [
                    {"aspect": aspect, "side": "b" if (side == "left") == b_first else "a", "rating": rating}
                    for aspect, side, rating in answer.aspects
                ],
            }
        )
        if answer.number >= FIRST_NUMBER:
            question = self.gold.question(answer.number)
            if question is None:
                raise LedgerError("there is no such question any more: load the page again")
            self.gold.keep(annotator, question, probability=probability, details=details)
            return Kept(sequence=None)
        event = await self.desk.answer(
            answer.number, answer.pair_id, annotator, probability=probability, details=details,
            reason=answer.reason[:MAX_TEXT] or None, skip=answer.choice is None,
        )  # fmt: skip
        return Kept(sequence=event.sequence, late=event.late)

    async def standing(self, annotator: str) -> tuple[Progress, Backlog]:
        """The annotator's progress and what waits."""
        return await self.desk.progress(annotator), await self.desk.backlog()


def as_choice(text: str) -> Choice | None:
    """A choice by its name; None for a skip, ValueError otherwise."""
    if text == "skip":
        return None
    if text not in {name for name, _, _ in BUTTONS} | {"both_bad"}:
        raise ValueError(f"'{text[:40]}' is no choice")
    return cast(Choice, text)
