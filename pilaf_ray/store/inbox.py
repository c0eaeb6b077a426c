"""Votes from outside on their way into a ledger that another process writes.

Whoever imports puts a file here, whole; the labelling desk takes it in and moves it away. A file that is
taken in twice changes nothing: the votes have keys.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pilaf_ray.store.records import Vote

NAME = "inbox"


def put_votes(run: Path, votes: Sequence[Vote]) -> Path:
    """Leave votes for the run in ``run``; returns the file."""
    inbox = run / NAME
    inbox.mkdir(exist_ok=True)
    draft = inbox / f".{uuid.uuid4().hex}"
    draft.write_text("".join(json.dumps(asdict(vote)) + "\n" for vote in votes))
    final = inbox / f"{draft.name[1:]}.jsonl"
    draft.replace(final)
    return final


def waiting_votes(inbox: Path) -> Iterator[tuple[Path, list[Vote]]]:
    """Each file that waits, and the votes in it."""
    for file in sorted(inbox.glob("*.jsonl")):
        yield file, [Vote(**json.loads(line)) for line in file.read_text().splitlines()]


def put_away(file: Path) -> None:
    """Mark a file as taken in."""
    file.replace(file.with_suffix(".done"))
