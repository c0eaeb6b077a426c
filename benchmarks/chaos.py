"""Faults in a running job, and what became of it: `python -m benchmarks.chaos --minutes 20 --seed 1`.

Starts a run, on the tiny model unless told otherwise, and kills (SIGKILL), stops (SIGSTOP, let go on after sixty
seconds if it is still there), starves (the kernel kills it for want of memory, where control groups may be made),
breaks (an exception), slows (a tenth of the time is left to it, for twenty seconds) or cuts off (its TCP connections
are destroyed) one role after the other, each at the moment at which some role begins a certain piece of work. With
``--disk-mib 3000`` the run has a small disk of its own, which is filled now and again.
With ``--every 60 --relentless`` faults keep that pace, whether the run is past the last one or not.
Faults that earlier runs have met least often come first. A fault is over when the role is back and a further step is
done; the ledger is read then. At the end the harness asks the run to stop, resumes it for two more steps and checks
the whole: no step missing or twice, batches complete, labels neither lost nor doubled, the ledger adds up.

Each fault is a line of ``docs/results/chaos/faults.jsonl``, each run one of ``runs.jsonl`` beside it;
``python -m benchmarks.chaos_table`` prints the table of all.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.chaos_books import read_books
from benchmarks.chaos_disk import fill_the_disk
from benchmarks.chaos_faults import (
    ALONE,
    TRAP_SECONDS,
    Aftermath,
    Cell,
    Outcome,
    cell,
    choose,
    count_cells,
    free_roles,
    inject,
    strike_at_once,
)
from benchmarks.chaos_job import MOMENTS, ROOT, Fault, Job, leave_nothing_behind
from benchmarks.chaos_journal import RESULTS, Journal, commit, summary
from benchmarks.machine import machine
from benchmarks.small_disk import small_disk

FULL_DISK_SHARE = 0.1
"""Of the faults of a run on a small disk."""
PATIENCE, RELENTLESS_PATIENCE = 240.0, 900.0
"""Seconds for a run to get past a fault; longer where others follow before it is."""
START_SECONDS = 900.0
"""For the first steps: where DeepSpeed's operators are not built yet, that takes minutes."""

Note = Callable[[Outcome], None]


def run_chaos(
    job: Job,
    *,
    seed: int,
    plan: Sequence[Fault] | None = None,
    seconds: float,
    every: float = 0.0,
    patience: float = PATIENCE,
    met: Sequence[dict[str, Any]] = (),
    fills_disk: bool = False,
    relentless: bool = False,
    note: Note = lambda _outcome: None,
) -> list[Outcome]:
    """Inject ``plan``, or faults that ``met`` has least often, for ``seconds``; then stop, resume and end.

    Args:
        every: seconds from one fault to the next, at least; a plan's come one after the other.
        patience: seconds until a run that is not past a fault counts as lost; it is then ended and resumed.
        fills_disk: also fill the disk of the run's folder, which must be a small one.
        relentless: strike whoever is there every ``every`` seconds, whether the run is past the faults before or not.
        note: told of each outcome.
    """
    storm = _Storm(job, random.Random(seed), count_cells(met), patience=patience, fills_disk=fills_disk, note=note)
    job.start("run.max_steps=1000000")
    job.wait(lambda: job.last_step() >= 2 or not job.runs(), START_SECONDS)
    started = time.monotonic()
    if plan is not None:
        for fault in plan:
            # Each has to strike, however slow the machine is.
            storm.inject(fault, moment_seconds=patience)
            storm.settle()
    while plan is None and time.monotonic() - started < seconds:
        begun = time.monotonic()
        if relentless:
            storm.strike(moment_seconds=every / 2)
        else:
            storm.next()
        while time.monotonic() < begun + every:
            storm.look()
            time.sleep(0.1)
    storm.settle()
    _stop_and_resume(job, patience)
    return storm.outcomes


class _Storm:
    """Faults that have struck a run, and those that it is not past yet."""

    def __init__(
        self, job: Job, draw: random.Random, counts: Counter[Cell], *, patience: float, fills_disk: bool, note: Note
    ) -> None:
        self._job, self._draw, self._counts = job, draw, counts
        self._patience, self._fills_disk, self._note = patience, fills_disk, note
        self._pending: list[Aftermath] = []
        self.outcomes: list[Outcome] = []

    def next(self) -> None:
        """One more fault, to a role whose loss can be told from those that the run is not past yet; or a short wait."""
        self.look()
        if self._fills_disk and self._draw.random() < FULL_DISK_SHARE:
            self.settle()
            self.fill_disk()
            return
        roles = self._job.roles()
        fault = choose(self._draw, roles, self._counts)
        free = free_roles(roles, [aftermath.fault.role for aftermath in self._pending])
        if fault.role in ALONE or fault.phase == "resume":
            # Its turn has come: the run is left in peace until it is past the others.
            self.settle()
            self.inject(fault)
        elif free:
            self.inject(fault if fault.role in free else choose(self._draw, free, self._counts, also=True))
        time.sleep(0.1)

    def strike(self, *, moment_seconds: float) -> None:
        """A fault to any role that has a process, at its moment, or at once where that does not come in time."""
        self.look()
        roles = self._job.roles()
        fault = choose(self._draw, roles, self._counts, also=True)
        pending = len(self._pending)
        self.inject(fault, moment_seconds=moment_seconds)
        if len(self._pending) > pending:
            return
        aftermath = strike_at_once(self._job, self._draw, patience=self._patience)
        if aftermath is not None:
            self._pending.append(aftermath)

    def inject(self, fault: Fault, *, moment_seconds: float = TRAP_SECONDS) -> None:
        """This fault, if its moment comes in time."""
        aftermath = inject(
            self._job, fault, patience=self._patience, meanwhile=self.look, moment_seconds=moment_seconds
        )
        # Also where its moment did not come: another cell is tried then.
        self._counts[cell(fault)] += 1
        if aftermath is not None:
            self._pending.append(aftermath)

    def fill_disk(self) -> None:
        """Fill the run's disk and make room again."""
        outcome = fill_the_disk(self._job, self._draw.choice(MOMENTS), patience=self._patience)
        if outcome is not None:
            self.outcomes.append(outcome)
            self._note(outcome)
            if not outcome.survived:
                _start_again(self._job)

    def look(self) -> None:
        """Take note of faults that the run is past; one that did not survive is started again."""
        for aftermath in list(self._pending):
            outcome = aftermath.look()
            if outcome is not None:
                self._pending.remove(aftermath)
                self.outcomes.append(outcome)
                self._note(outcome)
                if not outcome.survived:
                    self._pending.clear()
                    _start_again(self._job)
                    return

    def settle(self) -> None:
        """Wait until the run is past all faults."""
        while self._pending:
            self.look()
            time.sleep(0.1)


def _start_again(job: Job) -> None:
    """A run that did not survive goes on from its checkpoint, for the faults after it."""
    job.end()
    job.remove_traps()
    step = job.last_step()
    job.start("run.max_steps=1000000", "--resume")
    job.wait(lambda: job.last_step() > step or not job.runs(), START_SECONDS)


def _stop_and_resume(job: Job, patience: float) -> None:
    """As a scheduler does it; two further steps, evaluation and report come after."""
    job.stop(patience)
    done = job.last_step()
    job.start(f"run.max_steps={done + 2}", "--resume")
    job.wait(lambda: not job.runs(), START_SECONDS)
    code = job.process.wait(1)
    if code != 0 or job.last_step() != done + 2:
        raise RuntimeError(f"the resumed run ended with {code} at step {job.last_step()}; see {job.path}")


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Of faults, after the first steps.")] = 5.0,
    hours: Annotated[float, typer.Option(min=0.0, help="The same in hours; goes before the minutes.")] = 0.0,
    seed: int = 0,
    every: Annotated[float, typer.Option(min=0.0, help="Seconds from one fault to the next, at least.")] = 0.0,
    config: Annotated[Path, typer.Option(help="What is run.")] = ROOT / "configs/tiny.yaml",
    folder: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="Folder of the lines.")] = RESULTS,
    disk_mib: Annotated[int, typer.Option(min=0, help="Give the run a disk of its own, so large; 0: none.")] = 0,
    relentless: Annotated[bool, typer.Option(help="Strike every so many seconds, also amid recoveries.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the run.")] = None,
) -> None:
    """Inject faults and write down what became of them; exit code 1 if anything did not survive."""
    leave_nothing_behind()
    console = Console(width=160)
    where = machine()
    if relentless and not every:
        raise typer.BadParameter("--relentless needs --every: seconds from one fault to the next")
    facts = {"seed": seed, "commit": commit(), "cpu": where["cpu"], "cores": where["cores"], "config": config.name}
    journal = Journal(results, facts | {"overrides": overrides or []})
    folder = folder.resolve()
    disk = folder / "disk" if disk_mib else folder
    with small_disk(disk, mib=disk_mib) if disk_mib else nullcontext():
        job = Job(disk, f"chaos-{config.stem}-{seed}", overrides or [], config=config.resolve(), beside=folder)
        started = time.monotonic()

        def note(outcome: Outcome) -> None:
            journal.fault(outcome)
            console.print(f"[{time.monotonic() - started:6.0f} s] {outcome}", markup=False)

        try:
            outcomes = run_chaos(
                job, seed=seed, seconds=3600 * hours or 60 * minutes, every=every, met=journal.faults(), note=note,
                fills_disk=bool(disk_mib), relentless=relentless,
                patience=RELENTLESS_PATIENCE if relentless else PATIENCE,
            )  # fmt: skip
        finally:
            job.end()
        books = read_books(job)
        report = json.loads((job.path / "report/summary.json").read_text())
    gain = {key: report[key] for key in ("reward_before", "reward_after", "reward_gain", "reward_gain_se")}
    journal.run(outcomes, books, gain, seconds=time.monotonic() - started)
    console.print(summary(outcomes, books), markup=False)
    console.print(
        f"held-out reward: {gain['reward_before']:.3f} before, {gain['reward_after']:.3f} after; "
        f"gain {gain['reward_gain']:.3f}, standard error {gain['reward_gain_se']:.3f}"
    )
    if books.wrong or books.labels_lost or books.counted_twice or not all(o.survived for o in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
