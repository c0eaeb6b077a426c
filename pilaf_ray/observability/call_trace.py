"""Every call to a role on one time axis, in the trace format of Chrome, which Perfetto shows too."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self


class CallTrace:
    """Appends two events a call, as it begins and as it ends; calls to one role may overlap.

    The file is a JSON array whose end is missing while it is written, which viewers accept: a run that is killed
    leaves what it has seen. Use it in a ``with`` block; inside, :func:`traced` finds it.

    Args:
        clock: seconds; only differences count.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ids = count()
        # A call is worth some milliseconds at least: the buffer is written when it is full, and at the end.
        self._stream = path.open("a")
        if not path.stat().st_size:
            self._stream.write("[\n")

    def __enter__(self) -> Self:
        self._token = _TRACE.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        _TRACE.reset(self._token)
        self._stream.close()

    @contextmanager
    def call(self, role: str, name: str) -> Iterator[None]:
        """Record the enclosed call of ``name`` to ``role``, also if it fails."""
        number = next(self._ids)
        self._write("b", role, name, number)
        try:
            yield
        finally:
            self._write("e", role, name, number)

    def _write(self, phase: str, role: str, name: str, number: int) -> None:
        if self._stream.closed:
            return
        microseconds = round(self._clock() * 1e6)
        event = {"ph": phase, "cat": role, "name": name, "id": number, "ts": microseconds, "pid": 0, "tid": role}
        self._stream.write(json.dumps(event) + ",\n")


_TRACE: ContextVar[CallTrace | None] = ContextVar("call trace", default=None)


def traced(role: str, name: str) -> AbstractContextManager[None]:
    """Record the enclosed call where a trace is kept; ``name`` may be empty for calls that nobody wants to see."""
    trace = _TRACE.get()
    return trace.call(role, name) if trace is not None and name else nullcontext()
