"""How many cores a role takes."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilaf_ray.engines.core_share import CoreShare, CoreTimes, free_cores, read_core_times


def times(*, wall: float = 0.0, busy: float = 0.0, own: float = 0.0) -> CoreTimes:
    return CoreTimes(wall=wall, busy=busy, own=own)


@pytest.mark.parametrize(
    ("busy", "own", "cores", "free"),
    [
        (2.0, 2.0, 2, 2),  # alone, on both
        (2.0, 1.0, 2, 1),  # a neighbour keeps the other one busy
        (2.0, 1.3, 2, 1),  # two threads where a neighbour wants a core: it got 0.7 of one
        (1.0, 0.0, 2, 1),  # others work while this process rests
        (0.2, 0.1, 2, 2),  # everybody rests
        (8.0, 1.0, 8, 1),
        (5.0, 2.0, 8, 5),
        (8.0, 0.0, 8, 1),  # nothing is left, and one thread there must be
    ],
)
def test_what_others_left_in_a_second(busy: float, own: float, cores: int, free: int) -> None:
    assert free_cores(times(), times(wall=1.0, busy=busy, own=own), cores=cores) == free


@given(
    wall=st.floats(0.2, 1e4),
    own=st.floats(0, 1e6),
    others=st.floats(-1, 1e6),
    cores=st.integers(1, 256),
)
def test_any_answer_is_a_number_of_threads(wall: float, own: float, others: float, cores: int) -> None:
    # Ticks are rounded, so that others may seem to have given time back.
    assert 1 <= free_cores(times(), times(wall=wall, busy=own + others, own=own), cores=cores) <= cores


class Machine:
    """Gives the times it is told to, in order."""

    def __init__(self, *moments: CoreTimes) -> None:
        self._moments = list(moments)

    def __call__(self) -> CoreTimes:
        return self._moments.pop(0)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_follow_what_others_leave() -> None:
    cores = len(os.sched_getaffinity(0))
    share = CoreShare(
        "auto",
        read=Machine(
            times(),
            times(wall=1.0, busy=1.0, own=1.0),
            times(wall=1.1, busy=1.0 + cores, own=1.0),
            times(wall=2.0, busy=1.0 + cores, own=1.0),
        ),
    )
    assert torch.get_num_threads() == 1
    share.adapt()
    assert torch.get_num_threads() == cores
    share.adapt()  # too soon after the last look
    assert torch.get_num_threads() == cores
    share.adapt()
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("_threads")
def test_a_fixed_number_stays() -> None:
    share = CoreShare(1, read=Machine())
    share.adapt()
    assert torch.get_num_threads() == 1


def test_the_system_counts_this_process_among_the_busy() -> None:
    before = read_core_times()
    while (after := read_core_times()).own - before.own < 0.3:
        pass
    # Ticks are hundredths of a second, on each core and in the process.
    assert after.busy - before.busy >= after.own - before.own - 0.02 * (1 + len(os.sched_getaffinity(0)))
    assert after.wall - before.wall >= 0.3 / max(1, len(os.sched_getaffinity(0)))
