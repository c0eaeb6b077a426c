"""Freed memory goes back to the system when it is asked for."""

import os
import subprocess
import sys

from pilaf_ray.actors.launch import CPU_ALLOCATOR

WORK = """
import psutil
from pilaf_ray.engines.heap import give_back

def resident():
    return psutil.Process().memory_info().rss // 2**20

blocks = [bytearray(b"x") * 2**20 for _ in range(101)]
full = resident()
last = blocks.pop()
del blocks
freed = resident()
give_back()
print(full, freed, resident())
"""


def test_pages_that_are_free_inside_the_heap_are_given_back() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", WORK], env={**os.environ, **CPU_ALLOCATOR}, capture_output=True, text=True, check=True
    )
    full, freed, given = map(int, answer.stdout.split())
    assert full - freed < 10, "the roles' glibc keeps what is freed"
    assert full - given > 90
