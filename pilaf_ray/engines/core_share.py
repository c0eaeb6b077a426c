"""How many of the machine's cores a role computes with: a fixed number, or as many as nobody else keeps busy.

Roles on a small machine are busy in turns: generators rest while they are as far ahead as staleness allows, the learner
rests while it has no pairs. A fixed split leaves the cores of a resting role idle.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

# By name: vLLM's CPU worker puts a function that does nothing in its place in the module.
from torch import set_num_threads

from pilaf_ray.threads import Threads, starting_threads

SHORTEST_WINDOW = 0.2
"""Seconds; the system counts a core's time in hundredths of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreTimes:
    """Seconds up to a moment, on the cores that this process may use."""

    wall: float
    busy: float
    """Of all cores together, whoever kept them busy."""
    own: float
    """Of this process alone, all its threads together."""


def read_core_times() -> CoreTimes:
    """As they are now."""
    mine = os.sched_getaffinity(0)
    cores = [times for number, times in enumerate(psutil.cpu_times(percpu=True)) if number in mine]
    own = os.times()
    return CoreTimes(
        wall=time.monotonic(),
        # What a hypervisor took is as gone as what a neighbour took; time of guests is in "user" already.
        busy=sum(t.user + t.nice + t.system + t.irq + t.softirq + t.steal for t in cores),
        own=own.user + own.system,
    )


def free_cores(before: CoreTimes, after: CoreTimes, *, cores: int) -> int:
    """How many of ``cores`` others left to this process between two moments, to the nearest; at least one."""
    others = (after.busy - before.busy - (after.own - before.own)) / (after.wall - before.wall)
    return min(cores, max(1, round(cores - max(0.0, others))))


class CoreShare:
    """The threads of PyTorch in one process.

    Args:
        threads: a number, or ``auto``, which begins with one.
        read: what :func:`read_core_times` gives.
    """

    def __init__(self, threads: Threads, *, read: Callable[[], CoreTimes] = read_core_times) -> None:
        self._adapts, self._read = threads == "auto", read
        self._threads = starting_threads(threads)
        self._cores = len(os.sched_getaffinity(0))
        self._seen = read() if self._adapts else None
        set_num_threads(self._threads)

    def adapt(self) -> None:
        """Take what others left since the last look; to be called between two pieces of work, by the thread that works.

        PyTorch keeps the number of OpenMP threads for each thread that asks for work.
        """
        if self._seen is None:
            return
        now = self._read()
        if now.wall - self._seen.wall < SHORTEST_WINDOW:
            return
        wanted = free_cores(self._seen, now, cores=self._cores)
        self._seen = now
        if wanted != self._threads:
            self._threads = wanted
            set_num_threads(wanted)
