"""Faults in a running job, and what became of it: `python -m benchmarks.chaos --minutes 20 --seed 1`.

Starts a run on the tiny model, and at seeded, random moments kills (SIGKILL), stops (SIGSTOP, for good; the
controller for ten seconds), starves (the kernel kills it for want of memory, where control groups may be made) or
breaks (an exception) a role that is chosen at random. After each fault it waits
until the role is back and a further step is done, and reads the ledger. At the end it asks the run to stop,
resumes it for two more steps and checks the whole: no step missing or twice, batches complete, labels neither
lost nor doubled, the ledger adds up.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import out_of_memory

ROOT = Path(__file__).parents[1]
# Role: how its process is called; what events.jsonl says when it is back.
ROLES = {
    "generator": ("ray::_Generator", "replica replaced"),
    "engine": ("VLLM::EngineCore", "replica replaced"),
    "reference": ("ray::_Reference", "replica replaced"),
    "oracle": ("ray::_Oracle", "replica replaced"),
    "preference store": ("ray::_Store", "replica replaced"),
    "learner": ("ray::_Learner", "learner rebuilt"),
    "controller": ("", "roles ready"),
}
FAULTS = ("SIGKILL", "SIGSTOP", "exception", *(("out of memory",) if out_of_memory.available() else ()))
# The learner's process title names the call that it is in.
PHASES = {"train_step": "training", "publish": "weight sync", "policy_logprobs": "weight sync", "save": "checkpoint"}
STOPPED_CONTROLLER_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One fault and what it cost."""

    role: str
    fault: str
    phase: str
    survived: bool
    back_seconds: float | None
    """Until the role was there again; None where nothing had to be replaced."""
    step_seconds: float | None
    """Until a further step was done."""
    repeated_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """What the run's files say; every list names what should not be."""

    steps: int
    trained: int
    labels_lost: list[str] = field(default_factory=list)
    counted_twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Job:
    """A run in processes of its own, seen from outside."""

    def __init__(self, folder: Path, name: str, overrides: Sequence[str]) -> None:
        self.path = folder / name
        self._orders = folder / f"{name}-orders"
        self._orders.mkdir(parents=True, exist_ok=True)
        self._words = [
            str(ROOT / "configs/tiny.yaml"),
            f"run.folder={folder}",
            f"run.name={name}",
            "run.restarts=10",
            "checkpoint.every_steps=4",
            "supervision={heartbeat_every_seconds: 1, heartbeat_seconds: 6, failures_in_a_row: 6}",
            *overrides,
        ]
        self._log = (folder / f"{name}.log").open("ab")

    def start(self, *words: str) -> None:
        """Start (or resume, with ``--resume``) in the background."""
        hooks = f"{ROOT / 'benchmarks/chaos_hooks'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        self.process = psutil.Popen(
            [sys.executable, "-m", "pilaf_ray", "train", *self._words, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": hooks, "PILAF_CHAOS_FOLDER": str(self._orders)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def victim(self, role: str) -> psutil.Process | None:
        """A process of ``role``, or None where there is none just now."""
        if role == "controller":
            children = self.process.children()
            return children[0] if children else None
        return next((p for p in self._descendants() if _title(p).startswith(ROLES[role][0])), None)

    def strike(self, process: psutil.Process, fault: str) -> None:
        """Do it."""
        if fault == "exception":
            (self._orders / str(process.pid)).touch()
        elif fault == "out of memory":
            out_of_memory.starve(process.pid)
        else:
            process.send_signal(getattr(signal, fault))

    def phase(self) -> str:
        """What the learner is doing, or sampling where it waits."""
        learner = self.victim("learner")
        call = _title(learner).partition(".")[2].split("(")[0] if learner is not None else ""
        return PHASES.get(call, "sampling and labelling")

    def steps(self) -> list[int]:
        """Steps in metrics.jsonl."""
        return [record["step"] for record in _lines(self.path / "metrics.jsonl")]

    def events(self, since: float) -> list[dict[str, Any]]:
        """Events after a moment."""
        return [event for event in _lines(self.path / "events.jsonl") if event["time"] > since]

    def end(self) -> None:
        """Nothing is left behind."""
        for process in [*self._descendants(), self.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def _descendants(self) -> list[psutil.Process]:
        try:
            return list(self.process.children(recursive=True))
        except psutil.NoSuchProcess:
            return []


def inject(job: Job, role: str, fault: str, *, patience: float) -> Outcome | None:
    """One fault, and the wait until the run is past it; None where the role was not there to be hit."""
    victim = job.victim(role)
    if victim is None:
        return None
    phase, moment, before = job.phase(), time.time(), max(job.steps(), default=0)
    try:
        job.strike(victim, fault)
        if role == "controller" and fault == "SIGSTOP":
            time.sleep(STOPPED_CONTROLLER_SECONDS)
            victim.send_signal(signal.SIGCONT)
    except psutil.NoSuchProcess:
        return None
    needs_return = not (role == "controller" and fault == "SIGSTOP")
    word = ROLES[role][1]
    back: float | None = None
    lowest = before
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and job.process.is_running() and job.process.poll() is None:
        events = job.events(moment)
        back = next((e["time"] - moment for e in events if e["event"] == word), None)
        rolled_back = [e["step"] for e in events if e["event"] == "checkpoint loaded"]
        if any(e["event"] in ("learner rebuilt", "roles ready") for e in events):
            lowest = min([before, *(rolled_back or [0])])
        newest = max(job.steps(), default=0)
        if (back is not None or not needs_return) and newest > before:
            return Outcome(
                role=role, fault=fault, phase=phase, survived=True, back_seconds=back,
                step_seconds=time.time() - moment, repeated_steps=before - lowest,
            )  # fmt: skip
        time.sleep(0.1)
    return Outcome(
        role=role, fault=fault, phase=phase, survived=False, back_seconds=back, step_seconds=None,
        repeated_steps=before - lowest,
    )  # fmt: skip


class RunFiles(Protocol):
    """A run's folder and its steps."""

    path: Path

    def steps(self) -> list[int]: ...


def read_books(job: RunFiles, *, batch_pairs: int) -> Books:
    """Check the ended run's files against each other."""
    steps = job.steps()
    wrong = [] if steps == list(range(1, len(steps) + 1)) else [f"steps are {steps}"]
    ledger = sqlite3.connect(job.path / "preferences.db")

    def ask(query: str) -> list[tuple[Any, ...]]:
        return ledger.execute(query).fetchall()

    by_step = dict(ask("select trained_step, count(*) from pairs where state = 'trained' group by trained_step"))
    wrong += [f"step {s} trained {by_step.get(s, 0)} pairs" for s in steps if by_step.get(s) != batch_pairs]
    ((planned, rows),) = ask("select max(plan_index) + 1, count(*) from pairs")
    if planned != rows:
        wrong.append(f"{planned} pairs planned, {rows} in the ledger")
    no_label = "select pair_id from pairs where state in ('labeled', 'trained') and label_sequence is null"
    dangling = (
        "select pair_id from pairs where label_sequence is not null "
        "and label_sequence not in (select sequence from labels)"
    )
    doubled = "select plan_index, sampling from labels where kind = 'verdict' group by 1, 2 having count(*) > 1"
    return Books(
        steps=len(steps),
        trained=sum(by_step.values()),
        labels_lost=[row[0] for query in (no_label, dangling) for row in ask(query)],
        counted_twice=[f"pair {index}, sampling {sampling}" for index, sampling in ask(doubled)],
        wrong=wrong,
    )


def run_chaos(
    job: Job,
    *,
    seed: int,
    plan: Sequence[tuple[str, str]] | None = None,
    seconds: float,
    patience: float = 180.0,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Inject ``plan``, or random faults for ``seconds``; ends with a stop, a resumption and two more steps."""
    draw = random.Random(seed)
    outcomes: list[Outcome] = []
    job.start("run.max_steps=1000000")
    started = time.monotonic()
    _wait(lambda: len(job.steps()) >= 2, patience, job)
    deck: list[tuple[str, str]] = list(plan) if plan is not None else []
    while time.monotonic() - started < seconds and (deck or plan is None):
        if not deck:
            # Every combination before any comes again.
            deck = [(role, fault) for role in ROLES for fault in FAULTS if (role, fault) != ("engine", "exception")]
            draw.shuffle(deck)
        time.sleep(draw.uniform(0.0, 4.0))
        role, fault = deck.pop()
        outcome = inject(job, role, fault, patience=patience)
        if outcome is not None:
            outcomes.append(outcome)
            say(f"[{time.monotonic() - started:6.0f} s] {outcome}")
            if not outcome.survived:
                return outcomes
    job.process.send_signal(signal.SIGTERM)
    job.process.wait(patience)
    done = max(job.steps())
    job.start(f"run.max_steps={done + 2}", "--resume")
    _wait(lambda: job.process.poll() is not None, patience, job)
    if job.process.returncode != 0 or max(job.steps()) != done + 2:
        raise RuntimeError(f"the resumed run ended with {job.process.returncode} at step {max(job.steps())}")
    return outcomes


def table(outcomes: Sequence[Outcome]) -> Table:
    """Role by fault and phase."""
    grid = Table("role", "fault", "phase", "survived", "s to be back", "s to a further step", "steps repeated")
    keys = sorted({(o.role, o.fault, o.phase) for o in outcomes})
    for key in keys:
        found = [o for o in outcomes if (o.role, o.fault, o.phase) == key]
        grid.add_row(
            *key,
            f"{sum(o.survived for o in found)} of {len(found)}",
            _mean([o.back_seconds for o in found]),
            _mean([o.step_seconds for o in found]),
            _mean([float(o.repeated_steps) for o in found]),
        )
    return grid


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.1f}" if known else "–"


def _wait(condition: Callable[[], bool], seconds: float, job: Job) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {seconds:g} s; see {job.path}")
        time.sleep(0.1)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines so far; one that is being written is left for the next time."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 5.0,
    seed: int = 0,
    folder: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs"),
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the run.")] = None,
) -> None:
    """Inject faults and print what became of them; exit code 1 if anything did not survive."""
    console = Console(width=140)
    job = Job(folder.resolve(), f"chaos-{seed}", overrides or [])
    try:
        outcomes = run_chaos(job, seed=seed, seconds=60 * minutes, say=lambda text: console.print(text, markup=False))
    finally:
        job.end()
    console.print(table(outcomes))
    books = read_books(job, batch_pairs=4)
    console.print(
        f"{len(outcomes)} faults, {sum(o.survived for o in outcomes)} survived; {books.steps} steps, "
        f"{books.trained} pairs trained; labels lost: {len(books.labels_lost)}, counted twice: "
        f"{len(books.counted_twice)}; wrong: {books.wrong or 'nothing'}"
    )
    if books.wrong or books.labels_lost or books.counted_twice or not all(o.survived for o in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
