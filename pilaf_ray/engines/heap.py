"""Giving freed memory back to the system."""

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Return whole pages that are free in glibc's heap; does nothing with another C library.

    On CPUs activations and gradients live in that heap, and a learner's is told to keep what is freed
    (``actors/launch.py``). Weights that are copied out between two steps lie in its holes, so that the next step's
    gradients need new room, and the process grows with every kind of work that it does.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
