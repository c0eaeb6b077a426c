"""The controller itself is started again when it dies: a parent process that does nothing else.

A restarted controller continues the run of its name from the newest checkpoint, as ``--resume`` does.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pilaf_ray.observability.alerts import Alert, EventAlerts
from pilaf_ray.observability.sinks import EventLog
from pilaf_ray.pipeline.supervision import CircuitBreaker, SupervisionPolicy

CHILD = "PILAF_RAY_SUPERVISED"
"""Set in the environment of a controller that has such a parent."""
MISTAKE = 2
"""Exit code of a controller that refused its configuration or its inputs: another try would not help."""

Start = Callable[[bool], "subprocess.Popen[bytes]"]
"""``start(resume)`` starts a controller."""


def run_restartable(
    start: Start,
    *,
    resume: bool,
    folder: Path,
    restarts: int,
    policy: SupervisionPolicy,
    sleep: Callable[[float], None] = time.sleep,
    tell: Callable[[Alert], object] = lambda _alert: None,
) -> int:
    """Run a controller to its end, starting it again up to ``restarts`` times in a row; returns its exit code.

    Restarts are in a row where no further step was finished between them. A controller that was asked
    to stop, or that refused its inputs, is not started again. ``tell`` is given what people should know of it.

    Raises:
        GivenUpError: it died once more than ``restarts`` times in a row; tells the first cause.
    """
    breaker = CircuitBreaker("the controller", limit=restarts + 1)
    reached = _steps(folder)
    alerts = EventAlerts(tell)
    with _StopSignals() as stop:
        while True:
            code = stop.wait_for(start(resume))
            if code in (0, MISTAKE) or stop.requested:
                return code
            if _steps(folder) > reached:
                reached = _steps(folder)
                breaker.succeeded()
            breaker.failed(_describe(code))
            if breaker.is_open:
                given_up = breaker.error()
                alerts("given up", {"cause": str(given_up)})
                raise given_up
            resume = (folder / "config.json").exists()
            lost = {"cause": _describe(code), "step": reached}
            if resume:
                EventLog(folder / "events.jsonl").record("controller lost", **lost)
            alerts("controller lost", lost)
            sleep(policy.pause(breaker.failures))
            if stop.requested:
                # It came while there was no controller to be told.
                return code


def start_controller(arguments: Sequence[str]) -> Start:
    """What starts ``pilaf-ray train`` with ``arguments`` in a process of its own."""

    def start(resume: bool) -> "subprocess.Popen[bytes]":
        # Not `-m pilaf_ray`: `-c` works wherever this package was imported from.
        command = [sys.executable, "-c", "from pilaf_ray.cli import main; main()", "train", *arguments]
        return subprocess.Popen([*command, *(["--resume"] if resume else [])], env={**os.environ, CHILD: "1"})

    return start


class _StopSignals:
    """While it is open, SIGTERM is passed on to the controller, and it is remembered who asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_StopSignals":
        self._before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for(self, process: "subprocess.Popen[bytes]") -> int:
        """The exit code of ``process``."""
        self._process = process
        if self.requested and process.poll() is None:
            # It came while the controller was being started.
            process.send_signal(signal.SIGTERM)
        return process.wait()

    def _forward(self, number: int, _frame: object) -> None:
        self.requested = True
        # A terminal has sent its SIGINT to the whole group already.
        if number == signal.SIGTERM and self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def _steps(folder: Path) -> int:
    """Finished steps; a rollback may shorten the file, never lengthen it."""
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def _describe(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}; see its log"
