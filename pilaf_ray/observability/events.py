"""``events.jsonl``: starts, deaths, recoveries, weight versions, evaluations."""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pilaf_ray.observability.sinks import JsonLines, JsonValue


class EventLog:
    """Appends ``{time, event, role, …}``, one object a line, flushed at once.

    ``time`` is seconds since 1970.

    Example: ``events.write("weights", role="learner-0", version=3)``
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._lines = JsonLines(path)
        self._clock = clock

    def write(self, event: str, *, role: str, **fields: JsonValue) -> None:
        """Append one event; raises RunFolderError when the file cannot be written."""
        self._lines.append({"time": round(self._clock(), 3), "event": event, "role": role, **fields})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
