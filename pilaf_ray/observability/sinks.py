"""Where records of a run go."""

import json
import time
from pathlib import Path
from typing import Any


class JsonlSink:
    """Appends one JSON object a line, flushed at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record``."""
        with self._path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def cut_after(self, step: int) -> None:
        """Drop the records of later steps, so that a resumed run has one line a step."""
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self._path.write_text("".join(line + "\n" for line in kept))


class EventLog:
    """What happened to the roles, as JSON lines with a wall-clock time."""

    def __init__(self, path: Path) -> None:
        self._sink = JsonlSink(path)

    def record(self, event: str, **details: Any) -> None:
        """Append an event."""
        self._sink.write({"time": time.time(), "event": event, **details})
