"""A run whose oracle is a person in a browser: ``python -m benchmarks.people CONFIG [KEY=VALUE …]``.

A script plays the person: a headless Chromium is invited by the command line as a person is, reads the two answers
that the page shows and presses a key, knowing neither branch nor policy. What it likes is the function in
``evaluation.oracle``, rounded to the choices of the page. In the middle the console is killed. At the end the answers
that the page called saved are compared with the ledger, and the held-out rewards are printed.
"""

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.machine import machine
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.oracle import FunctionOracleConfig, HumanOracleConfig
from pilaf_ray.config.schema import RunConfig

CONSOLE_TITLE = "ray::_Console"
PATIENCE_SECONDS = 60.0
KEYS = {"a_much": "1", "a": "2", "a_slightly": "3", "equal": "4", "b_slightly": "5", "b": "6", "b_much": "7"}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """The ledger against what the person was told."""

    saved: int
    """Answers that the page called saved."""
    votes: int
    """Answers in the ledger."""
    saved_only: list[tuple[str, str]]
    """(pair, choice) that the page called saved and the ledger does not hold."""
    ledger_only: list[tuple[str, str]]
    pairs: dict[str, int]
    """Pairs by state."""


@dataclass(kw_only=True, slots=True)
class Work:
    """What the person saw of their own work."""

    saved: list[tuple[str, str]] = field(default_factory=list)
    """(pair, choice) of each answer that the page called saved."""
    waited: float = 0.0
    """Seconds with nothing to label."""
    console_killed_after: int | None = None
    """Answers that were saved before it."""


class Person:
    """A page of the console and someone with a taste in front of it.

    Args:
        page: Playwright's page, signed in, on the labelling page.
        settings: what the choices mean, as P(left answer is better).
        gold: the person's taste.
    """

    def __init__(self, page: Any, settings: HumanOracleConfig, gold: FunctionOracleConfig) -> None:
        module, _, name = gold.target.partition(":")
        self._page, self._score, self._scale = page, getattr(import_module(module), name), gold.scale
        self._choices = {name: p for name, p in settings.choices.items() if p is not None}

    def choice(self) -> tuple[str, str]:
        """The pair on the page, and the choice nearest to this person's P(left is better)."""
        prompt = self._page.inner_text("#prompt")
        left, right = (self._page.inner_text(f'[data-answer="{side}"]') for side in "AB")
        rewards = self._score([prompt, prompt], [left, right])
        chance = 0.5 * (1.0 + math.tanh(self._scale * (rewards[0] - rewards[1]) / 2.0))
        nearest = min(self._choices, key=lambda name: abs(self._choices[name] - chance))
        return str(self._page.input_value('#answer input[name="pair"]')), nearest

    def rest(self) -> None:
        """A moment without a task."""
        self._page.wait_for_timeout(200)

    def answer(self) -> tuple[str, str] | None:
        """Label what the page shows; None where it shows nothing, or did not call the answer saved in a minute."""
        if self._page.query_selector("#answer") is None:
            return None
        shown = self._page.get_attribute("#answer", "data-number")
        pair, choice = self.choice()
        self._page.keyboard.press(KEYS[choice])
        moved_on = f"document.querySelector('#answer')?.dataset.number !== '{shown}'"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._page.evaluate(f"{moved_on} && !document.querySelector('[aria-busy]')"):
            if time.monotonic() > deadline:
                return None
            self._page.wait_for_timeout(20)
        return (pair, choice) if self._page.inner_text("#notice").startswith("Saved") else None


class Job:
    """The run, in processes of its own."""

    def __init__(self, config: Path, overrides: list[str], run: RunConfig) -> None:
        self.folder = Path(run.run.folder) / run.run.name
        self.log = Path(run.run.folder) / f"{run.run.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = psutil.Popen(
            [sys.executable, "-m", "pilaf_ray", "train", str(config), *overrides],
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_for_console(self) -> None:
        """Until the run has said where its console is."""
        while "console: http" not in self.log.read_text():
            if not self.alive:
                raise RuntimeError(f"the run ended before its console began: see {self.log}")
            time.sleep(0.5)

    def invitation(self, name: str) -> str:
        """A link as the lead would send it."""
        words = ["console", str(self.folder), "--invite", name, "--role", "annotator"]
        told = subprocess.run(
            [sys.executable, "-m", "pilaf_ray", *words], capture_output=True, text=True, check=True
        ).stdout
        return re.findall(r"http\S+", told)[0]

    def end(self) -> None:
        """Ask a run that is still under way to end."""
        if self.alive:
            self.process.terminate()
            self.process.wait(120)

    def kill_console(self) -> None:
        """SIGKILL to the process that serves the pages."""
        (process,) = [
            p for p in self.process.children(recursive=True) if p.cmdline() and p.cmdline()[0].startswith(CONSOLE_TITLE)
        ]
        os.kill(process.pid, signal.SIGKILL)


def label_all(job: Job, person: Person, *, kill_after: int) -> Work:
    """Answer until the run ends."""
    work = Work()
    while job.alive:
        started = time.monotonic()
        kept = person.answer()
        if kept is not None:
            work.saved.append(kept)
            if work.console_killed_after is None and len(work.saved) >= kill_after:
                job.kill_console()
                work.console_killed_after = len(work.saved)
        else:
            person.rest()
            work.waited += time.monotonic() - started
    return work


@contextmanager
def labelling_page(invitation: str) -> Iterator[Any]:
    """Playwright's page in a headless Chromium, signed in by the link."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        page = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS)).new_page()
        page.goto(invitation)
        page.wait_for_url("**/label")
        yield page


def books(folder: Path, work: Work) -> Books:
    """The ledger's votes against what the page called saved, and what became of them."""
    with sqlite3.connect(f"file:{folder / 'preferences.db'}?mode=ro", uri=True) as ledger:
        votes = ledger.execute(
            "select pairs.pair_id, labels.details from labels "
            "join pairs on pairs.plan_index = labels.plan_index where labels.kind = 'vote'"
        ).fetchall()
        states = dict(ledger.execute("select state, count(*) from pairs group by state").fetchall())
    kept = Counter((pair, json.loads(details)["choice"]) for pair, details in votes)
    said = Counter(work.saved)
    return Books(
        saved=len(work.saved),
        votes=len(votes),
        saved_only=sorted((said - kept).elements()),
        ledger_only=sorted((kept - said).elements()),
        pairs=states,
    )


def main(
    config: Path,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the run.")] = None,
    kill_after: Annotated[int, typer.Option(help="Answers before the console is killed.")] = 40,
) -> None:
    """Run it and print what happened as JSON."""
    words = overrides or []
    run = load_config(config, words)
    gold = run.evaluation.oracle
    if not isinstance(run.oracle, HumanOracleConfig) or not isinstance(gold, FunctionOracleConfig):
        raise typer.BadParameter("oracle.type must be human, and evaluation.oracle a function, whose taste is played")
    job = Job(config, words, run)
    try:
        job.wait_for_console()
        with labelling_page(job.invitation("ada")) as page:
            work = label_all(job, Person(page, run.oracle, gold), kill_after=kill_after)
    finally:
        job.end()
    told = {
        "machine": machine(),
        "choices": Counter(choice for _, choice in work.saved),
        "seconds_without_a_task": work.waited,
        "console_killed_after": work.console_killed_after,
        "books": asdict(books(job.folder, work)),
        "summary": json.loads((job.folder / "report" / "summary.json").read_text()),
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    typer.run(main)
