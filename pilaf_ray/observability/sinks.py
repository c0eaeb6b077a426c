"""Where records of a run go."""

import json
import os
import time
from pathlib import Path
from typing import Any

from pilaf_ray.errors import RunFolderError

_LAST_BYTES = 65536


class JsonlSink:
    """Appends one JSON object a line, flushed at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record``."""
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            with self._path.open("a") as stream:
                stream.write(line)
        except OSError as error:
            raise RunFolderError(
                f"{self._path}: cannot write ({error.strerror}); make room and continue with --resume"
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """Every record; the last one must be whole."""
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def cut_after(self, step: int) -> None:
        """Drop the records of later steps, so that a resumed run has one line a step."""
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            # Replaced at once: a kill in the middle must not lose the lines that are kept.
            shorter = self._path.with_suffix(".tmp")
            shorter.write_text("".join(line + "\n" for line in kept))
            shorter.replace(self._path)


class EventLog:
    """What happened to the roles, as JSON lines with a wall-clock time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sink = JsonlSink(path)

    def record(self, event: str, **details: Any) -> None:
        """Append an event."""
        self._sink.write({"time": time.time(), "event": event, **details})

    def newest(self) -> dict[str, Any]:
        """The last event; empty where there is none, or where a process died in the middle of writing one."""
        if not self._path.exists():
            return {}
        with self._path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _LAST_BYTES))
            lines = stream.read().splitlines()
        try:
            return dict(json.loads(lines[-1])) if lines else {}
        except json.JSONDecodeError:
            return {}
