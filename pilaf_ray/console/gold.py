"""Questions with known answers, mixed into an annotator's queue without being marked."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilaf_ray.errors import ConfigError

FIRST_NUMBER = 2**40
"""Leases are numbered from 1, gold questions from here: one kind of number for both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldQuestion:
    """A pair whose better answer is known."""

    number: int
    prompt: str
    a: str
    b: str
    prefers_a: bool


def load_gold(path: Path) -> list[GoldQuestion]:
    """Questions from a .jsonl file; raises ConfigError where it is missing or a line is not a question."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"oracle.gold.path: {path} cannot be read ({error.strerror})") from error
    questions = []
    for count, line in enumerate(filter(str.strip, lines)):
        row = json.loads(line)
        missing = {"prompt", "response_a", "response_b", "preferred"} - set(row)
        if missing or row["preferred"] not in ("a", "b"):
            raise ConfigError(
                f"oracle.gold.path: line {count + 1} of {path} needs prompt, response_a, response_b and "
                "preferred, which is a or b"
            )
        questions.append(
            GoldQuestion(
                number=FIRST_NUMBER + count, prompt=row["prompt"], a=row["response_a"], b=row["response_b"],
                prefers_a=row["preferred"] == "a",
            )
        )  # fmt: skip
    return questions


class GoldBook:
    """Who is asked which gold question, and what was answered; answers are on disk before they are acknowledged."""

    def __init__(self, path: Path, questions: Sequence[GoldQuestion], *, share: float) -> None:
        self._path, self._share = path, share
        self._questions = {question.number: question for question in questions}
        self._answers: dict[tuple[str, int], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self._answers[row["annotator"], row["question"]] = row

    def next_for(self, annotator: str, *, answers: int) -> GoldQuestion | None:
        """A question, if it is time for one: a draw that depends on the annotator's number of answers so far."""
        done = {question for name, question in self._answers if name == annotator}
        left = [question for number, question in self._questions.items() if number not in done]
        draw = int.from_bytes(hashlib.sha256(f"{annotator}/{answers + len(done)}".encode()).digest()[:8], "big")
        if not left or draw / 2**64 >= self._share:
            return None
        return left[draw % len(left)]

    def question(self, number: int) -> GoldQuestion | None:
        """The question of that number."""
        return self._questions.get(number)

    def keep(self, annotator: str, question: GoldQuestion, *, probability: float | None, details: str) -> None:
        """Write an answer; the first one stands."""
        if (annotator, question.number) in self._answers:
            return
        right = probability is not None and probability != 0.5 and (probability > 0.5) == question.prefers_a
        row = {
            "annotator": annotator, "question": question.number, "probability": probability, "right": right,
            "details": details, "time": time.time(),
        }  # fmt: skip
        with self._path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._answers[annotator, question.number] = row

    def accuracy(self, annotator: str) -> tuple[int, int]:
        """(right, all) answers of an annotator."""
        mine = [row for (name, _), row in self._answers.items() if name == annotator]
        return sum(bool(row["right"]) for row in mine), len(mine)
