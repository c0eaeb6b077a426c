"""A run whose disk is full at a moment of its work, and that is continued once there is room again."""

import time
from collections.abc import Callable

from benchmarks import small_disk
from benchmarks.chaos_books import look
from benchmarks.chaos_faults import TRAP_SECONDS, Outcome
from benchmarks.chaos_job import FULL_DISK, Fault, Job

DISK = "disk"
FULL_SECONDS = 20.0
"""So long nobody makes room; a run that has not written meanwhile goes on as if nothing had been."""


def fill_the_disk(
    job: Job, moment: str, *, patience: float, wait: Callable[[float], None] = time.sleep
) -> Outcome | None:
    """Fill the run's disk at ``moment``, make room, continue a run that has ended; None where the moment does not come.

    A full disk ends a run: only somebody else can mend it. It is survived if nothing is lost and ``--resume`` goes on.
    """
    fault = Fault(role=DISK, kind=FULL_DISK, moment=moment)
    before, mark = look(job.path), job.event_mark()
    job.set_trap(0, fault)
    struck = _moment(job, fault, wait)
    if struck is None:
        return None
    step = job.last_step()
    deadline = struck + FULL_SECONDS
    while time.time() < deadline and job.runs():
        wait(0.1)
    ended = not job.runs()
    small_disk.make_room(job.path.parent)
    if ended:
        job.remove_traps()
        job.start("run.max_steps=1000000", "--resume")
    limit = time.time() + patience
    while job.last_step() <= step and time.time() < limit and job.runs():
        wait(0.1)
    after = look(job.path)
    loaded = [event["step"] for event in job.events(mark) if event["event"] == "checkpoint loaded"]
    return Outcome(
        role=DISK,
        fault=FULL_DISK,
        moment=moment,
        delay=0.0,
        survived=job.last_step() > step,
        back_seconds=None,
        step_seconds=time.time() - struck,
        repeated_steps=step - min([step, *loaded]),
        resampled_pairs=after.resampled - before.resampled,
        labels_lost=len(after.labels_lost) + max(0, before.labels - after.labels),
        counted_twice=len(after.counted_twice),
        losses=["the run ended, and was continued"] if ended else [],
    )


def _moment(job: Job, fault: Fault, wait: Callable[[float], None]) -> float | None:
    deadline = time.monotonic() + TRAP_SECONDS
    while time.monotonic() < deadline and job.runs():
        struck = job.sprung(fault)
        if struck is not None:
            return struck
        wait(0.02)
    job.remove_traps()
    return job.sprung(fault)
