"""What faults became of, written down as they come: lines of ``faults.jsonl`` and ``runs.jsonl``."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.chaos_books import Books
from benchmarks.chaos_faults import Outcome
from benchmarks.chaos_job import ROOT

RESULTS = ROOT / "docs/results/chaos"


class Journal:
    """The lines of all runs so far, and of this one."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._folder, self._facts = folder, facts
        folder.mkdir(parents=True, exist_ok=True)

    def faults(self) -> list[dict[str, Any]]:
        """Outcomes of every run that is written here."""
        return read_lines(self._folder / "faults.jsonl")

    def fault(self, outcome: Outcome) -> None:
        """Add an outcome."""
        self._add("faults.jsonl", asdict(outcome))

    def run(self, outcomes: Sequence[Outcome], books: Books, gain: dict[str, float], *, seconds: float) -> None:
        """Add the run's end."""
        survived = sum(outcome.survived for outcome in outcomes)
        found = {"faults": len(outcomes), "survived": survived, "seconds": round(seconds), **asdict(books), **gain}
        self._add("runs.jsonl", found)

    def _add(self, name: str, line: dict[str, Any]) -> None:
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}
        with (self._folder / name).open("a") as stream:
            stream.write(json.dumps({**self._facts, **rounded}) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def commit() -> str:
    """The commit that runs, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def summary(outcomes: Sequence[Outcome], books: Books) -> str:
    """One line about a run."""
    return (
        f"{len(outcomes)} faults, {sum(o.survived for o in outcomes)} survived; {books.steps} steps, "
        f"{books.trained} pairs trained; labels lost: {len(books.labels_lost)}, counted twice: "
        f"{len(books.counted_twice)}; wrong: {books.wrong or 'nothing'}"
    )
