"""Which fault comes next, and what became of it."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.chaos_books import LedgerLook, look
from benchmarks.chaos_hooks import sitecustomize as hooks
from benchmarks.chaos_job import FAULTS, MOMENTS, MORE, Fault, Job

STOPPED_SECONDS = 60.0
"""After so long a stopped process is let go on."""
WATCHED_SECONDS = 5.0
"""How long a process that goes on is watched for damage."""
TRAP_SECONDS = 45.0
"""How long a moment is waited for; a resumption comes after the learner has been started anew, and is given longer."""
RESUMPTION_SECONDS = 240.0
# Seconds that the moments take on the tiny model, about: a fault strikes at their beginning or somewhere in them.
SPANS = {"sampling": 0.2, "training": 0.2, "weight sync.pull": 0.2, "checkpoint.write": 0.1, "resume.load": 0.1}
SHORT_SPAN = 0.01
# Role: the event of its return, and how that names the role; a controller that is back has brought everybody back.
RETURNS = {
    "generator": ("replica replaced", "generator"),
    "engine": ("replica replaced", "generator"),
    "reference": ("replica replaced", "reference"),
    "oracle": ("replica replaced", "oracle"),
    "preference store": ("replica replaced", "preference store"),
    "learner": ("learner rebuilt", None),
    "reward model": ("learner rebuilt", None),
    "controller": ("roles ready", None),
}
TOGETHER = ({"generator", "engine"},)
"""Roles that are replaced as one."""
ALONE = {"learner", "reward model", "controller"}
"""Whose loss stops the run, so that no other fault can be told from it."""
_LOSSES = ("replica lost", "learner lost", "controller lost")
_ENDS_OF_LOSSES = ("replica replaced", "learner rebuilt")
_ALL_ARE_THERE = "roles ready"
"""A controller that starts again starts every role, whoever was missing before."""

Cell = tuple[str, str, str]
"""Role, kind of fault, phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One fault and what it cost. Times in seconds from the moment it struck."""

    role: str
    fault: str
    moment: str
    delay: float
    survived: bool
    back_seconds: float | None
    """Until the role was there again; None where nothing had to be replaced."""
    step_seconds: float | None
    """Until a further step was done."""
    repeated_steps: int
    resampled_pairs: int
    labels_lost: int
    counted_twice: int
    losses: list[str] = field(default_factory=list)
    """Every loss that the run noticed meanwhile, with its cause."""
    came_back: bool | None = None
    """Of a stopped process: whether it was still there to go on when it was let."""
    lingered: bool | None = None
    """Of one that came back although it had been replaced: whether it was still there a while later."""


def cell(fault: Fault) -> Cell:
    """The place of a fault in the table."""
    return make_cell(fault.role, fault.kind, fault.moment)


def make_cell(role: str, kind: str, moment: str) -> Cell:
    """Faults of ``MORE`` have one place for all phases."""
    return role, kind, moment.partition(".")[0] if kind in FAULTS else "any"


def roles_missing(events: Iterable[str]) -> int:
    """How many of the losses among a run's events, by name and in order, nobody has made good yet."""
    missing = 0
    for event in events:
        if event == _ALL_ARE_THERE:
            missing = 0
        elif event in _LOSSES:
            missing += 1
        elif event in _ENDS_OF_LOSSES:
            missing = max(0, missing - 1)
    return missing


def free_roles(roles: Sequence[str], pending: Sequence[str]) -> list[str]:
    """Roles that may be struck while others recover: the work of those that are computing goes on."""
    if ALONE & set(pending):
        return []
    taken = set(pending).union(*(group for group in TOGETHER if group & set(pending)))
    return [role for role in roles if role not in taken | (ALONE if pending else set())]


def choose(draw: random.Random, roles: Sequence[str], counts: Mapping[Cell, int], *, also: bool = False) -> Fault:
    """A fault of one of the cells that were met least often; ``also`` where the run is not past another one."""
    possible = [
        Fault(role=role, kind=kind, moment=moment)
        for role in roles
        for kind in (*FAULTS, *MORE)
        for moment in MOMENTS
        # A resumption begins with a loss of the learner; the new reward model's process is not known before.
        if moment != "resume.load" or not (also or role == "reward model")
    ]
    cells = sorted({cell(fault) for fault in possible})
    fewest = min(counts.get(key, 0) for key in cells)
    wanted = draw.choice([key for key in cells if counts.get(key, 0) == fewest])
    found = draw.choice([fault for fault in possible if cell(fault) == wanted])
    span = SPANS.get(found.moment, SHORT_SPAN)
    delay = 0.0 if draw.random() < 0.5 else round(draw.uniform(0.0, span), 4)
    return Fault(role=found.role, kind=found.kind, moment=found.moment, delay=delay)


def inject(
    job: Job, fault: Fault, *, patience: float, meanwhile: Callable[[], object], moment_seconds: float = TRAP_SECONDS
) -> "Aftermath | None":
    """One fault; None where the role is not there, or the moment does not come.

    Args:
        moment_seconds: how long the moment is waited for.
        patience: seconds until the run counts as lost.
        meanwhile: called while the moment is waited for.
    """
    victim = job.victim(fault.role)
    if victim is None:
        return None
    before, mark = look(job.path), job.event_mark()
    struck = _strike(job, victim, fault, meanwhile, moment_seconds)
    if struck is None:
        return None
    # Not earlier: steps go on until the moment comes.
    step = job.last_step()
    return Aftermath(job, fault, victim, before, struck=struck, step=step, mark=mark, patience=patience)


def strike_at_once(job: Job, draw: random.Random, *, patience: float) -> "Aftermath | None":
    """Kill or stop any role that has a process, whatever the run is doing; None where nobody has one."""
    fault = Fault(role=draw.choice(job.roles()), kind=draw.choice(("SIGKILL", "SIGSTOP")), moment="recovery")
    victim = job.victim(fault.role)
    if victim is None:
        return None
    before, mark, step = look(job.path), job.event_mark(), job.last_step()
    job.strike(victim, fault.kind)
    return Aftermath(job, fault, victim, before, struck=time.time(), step=step, mark=mark, patience=patience)


def _strike(
    job: Job, victim: psutil.Process, fault: Fault, meanwhile: Callable[[], object], moment_seconds: float
) -> float | None:
    resumes = fault.phase == "resume"
    job.set_trap(0 if resumes and fault.role == "learner" else victim.pid, fault)
    if resumes:
        learner = job.victim("learner")
        if learner is not None:
            learner.kill()
    deadline = time.monotonic() + (RESUMPTION_SECONDS if resumes else moment_seconds)
    while time.monotonic() < deadline and job.runs():
        struck = job.sprung(fault)
        if struck is not None:
            return struck
        meanwhile()
        time.sleep(0.02)
    job.remove_traps()
    return job.sprung(fault)


class Aftermath:
    """The run after a fault, looked at now and again."""

    def __init__(
        self, job: Job, fault: Fault, victim: psutil.Process, before: LedgerLook, *,
        struck: float, step: int, mark: int, patience: float,
    ) -> None:  # fmt: skip
        self.fault = fault
        self._job, self._victim, self._before = job, victim, before
        self._struck, self._step, self._mark = struck, step, mark
        # A stopped process is given its time beside the run's.
        self._deadline = struck + patience + (STOPPED_SECONDS if fault.kind == "SIGSTOP" else 0.0)
        self._lowest = step
        self._back: float | None = None
        self._further: float | None = None
        self._came_back: bool | None = None
        self._let_go = 0.0

    def look(self) -> Outcome | None:
        """What became of the fault, once the run is past it or has had its time; None before."""
        self._follow_victim()
        self._read_events()
        is_back = self._back is not None or bool(self._came_back) or self._is_unharmed()
        if self._further is None and is_back and self._job.last_step() > self._step:
            self._further = time.time() - self._struck
        survived = self._further is not None and self._is_over()
        if survived or time.time() > self._deadline or not self._job.runs():
            return self._outcome(survived=survived)
        return None

    def _outcome(self, *, survived: bool) -> Outcome:
        after = look(self._job.path)
        return Outcome(
            role=self.fault.role,
            fault=self.fault.kind,
            moment=self.fault.moment,
            delay=self.fault.delay,
            survived=survived,
            back_seconds=self._back,
            step_seconds=self._further,
            repeated_steps=self._step - self._lowest,
            resampled_pairs=after.resampled - self._before.resampled,
            labels_lost=len(after.labels_lost) + max(0, self._before.labels - after.labels),
            counted_twice=len(after.counted_twice),
            losses=[_describe(event) for event in self._events() if event["event"] in _LOSSES],
            came_back=self._came_back,
            lingered=_is_alive(self._victim) if self._came_back and self._back is not None else None,
        )

    def _events(self) -> list[dict[str, Any]]:
        return self._job.events(self._mark)

    def _follow_victim(self) -> None:
        """A stopped process is let go on after its time; one that was killed meanwhile is not waited for."""
        if self.fault.kind != "SIGSTOP" or self._came_back is not None:
            return
        if not _is_alive(self._victim):
            self._came_back = False
        elif time.time() - self._struck >= STOPPED_SECONDS:
            self._victim.send_signal(signal.SIGCONT)
            self._came_back, self._let_go = True, time.monotonic()

    def _read_events(self) -> None:
        word, name = RETURNS[self.fault.role]
        events = [event for event in self._events() if event["time"] > self._struck]
        if self._back is None:
            returns = [
                event["time"] - self._struck
                for event in events
                if event["event"] == "roles ready" or (event["event"] == word and name in (None, event.get("role")))
            ]
            self._back = min(returns, default=None)
        if any(event["event"] in ("learner rebuilt", "roles ready") for event in events):
            steps = [event["step"] for event in events if event["event"] == "checkpoint loaded"]
            self._lowest = min([self._step, *(steps or [0])])

    def _is_unharmed(self) -> bool:
        """Of a fault that need not cost a role: it has passed, and whoever was lost by it is back."""
        passed = hooks.SLOW_SECONDS if self.fault.kind == "slow" else WATCHED_SECONDS
        if self.fault.kind not in MORE or time.time() - self._struck < passed:
            return False
        return not roles_missing(event["event"] for event in self._events() if event["time"] > self._struck)

    def _is_over(self) -> bool:
        if self.fault.kind in MORE:
            return self._is_unharmed()
        if self.fault.kind != "SIGSTOP":
            return True
        if self._came_back:
            return time.monotonic() - self._let_go >= WATCHED_SECONDS
        return self._came_back is False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _describe(event: Mapping[str, Any]) -> str:
    who = f"{event['role']} {event['replica']}" if "role" in event else event["event"].removesuffix(" lost")
    return f"{who}: {str(event['cause'])[:160]}"


def count_cells(outcomes: Sequence[Mapping[str, Any]]) -> Counter[Cell]:
    """How often each cell was met."""
    return Counter(make_cell(line["role"], line["fault"], line["moment"]) for line in outcomes)
