"""Processes that do one thing each time they are told to, so that what is compared takes turns in one run.

``Worker`` is the side that tells: ``python -m MODULE`` gets one line of JSON with its arguments, then one line a
command, and answers each with one line. ``Commands`` is the side that is told.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil


class Worker:
    """One process; ``python -m benchmarks.MODULE`` with ``arguments``.

    Args:
        environment: variables beside those of this process.
    """

    def __init__(self, module: str, arguments: Mapping[str, Any], *, environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            text=True,
        )
        self._send(arguments)

    def ask(self, **command: Any) -> Any:
        """The answer to a command; raises RuntimeError with the process's last words if it died of it."""
        self._send(command)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended without an answer:\n{self._last_words()}")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end; harmless where it has."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"{self._process.args!r} has ended:\n{self._last_words()}") from error

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-3000:]


class Commands:
    """What a worker is told. Libraries may print what they like: it goes where errors go."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.arguments: dict[str, Any] = json.loads(sys.stdin.readline())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next command, when it comes; none comes any more once the other side has closed."""
        line = sys.stdin.readline()
        if not line:
            raise StopIteration
        command: dict[str, Any] = json.loads(line)
        return command

    def answer(self, message: Mapping[str, Any]) -> None:
        """Say what came of the command."""
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def resident_mib() -> float:
    """Memory of this process now."""
    return float(psutil.Process().memory_info().rss) / 2**20


def forget_peak() -> None:
    """Let :func:`peak_mib` count from now on; Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Largest resident memory of this process since :func:`forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
