"""How many threads a role computes with on CPUs."""

from typing import Literal

Threads = int | Literal["auto"]
"""A number, or ``auto``: as many as other processes leave cores, looked at again between two pieces of work."""


def starting_threads(threads: Threads) -> int:
    """Before the first look."""
    return 1 if threads == "auto" else threads
