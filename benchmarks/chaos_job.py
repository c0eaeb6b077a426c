"""A run in processes of its own, seen from outside and struck from there."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import network_cut, out_of_memory
from benchmarks.chaos_hooks import sitecustomize as hooks

ROOT = Path(__file__).parents[1]
# Role: how its process is called.
ROLES = {
    "generator": "ray::_Generator",
    "engine": "VLLM::EngineCore",
    "reference": "ray::_Reference",
    "oracle": "ray::_Oracle",
    "preference store": "ray::_Store",
    "learner": "ray::_Learner",
    "reward model": "ray::_Reward",
    "controller": "",
}
FAULTS = ("SIGKILL", "SIGSTOP", "exception", *(("out of memory",) if out_of_memory.available() else ()))
MORE = ("slow", *(("network cut",) if network_cut.available() else ()))
"""Faults that are met once a role, not once a phase: nothing need be lost by them."""
FULL_DISK = "full disk"
"""Of the role ``disk``: only runs on a small disk of their own meet it."""
MOMENTS = tuple(dict.fromkeys(phase for phase, *_ in hooks.PHASES))
"""When a fault may strike; what stands before the dot is the phase."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""
OWN_JOBS = ("", "01000000", "ffffffff")
"""Ray's names of the job of the driver that has started a cluster, and of processes that it starts in advance."""
SUPERVISION = "supervision={heartbeat_every_seconds: 1, heartbeat_seconds: 10, failures_in_a_row: 6}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What is done to whom, and when."""

    role: str
    kind: str
    moment: str
    delay: float = 0.0
    """Seconds after the moment's beginning."""

    @property
    def phase(self) -> str:
        """What the run is doing then."""
        return self.moment.partition(".")[0]


class Job:
    """A run in processes of its own.

    Args:
        folder: of runs.
        config: YAML file; the tiny model's when left out.
        base: settings before ``overrides``.
        struck: whether its processes obey orders to fail.
        beside: where orders and the run's output go; ``folder`` when left out.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        overrides: Sequence[str],
        *,
        config: Path = ROOT / "configs/tiny.yaml",
        base: Sequence[str] = ("run.restarts=10", "checkpoint.every_steps=4", SUPERVISION),
        struck: bool = True,
        beside: Path | None = None,
    ) -> None:
        self.path = folder / name
        beside = beside or folder
        self.orders = beside / f"{name}-orders"
        self.orders.mkdir(parents=True, exist_ok=True)
        self._words = [str(config), f"run.folder={folder}", f"run.name={name}", *base, *overrides]
        self._hooks = f"{ROOT / 'benchmarks/chaos_hooks'}:" if struck else ""
        self._log = (beside / f"{name}.log").open("ab")

    def start(self, *words: str) -> None:
        """Start (or resume, with ``--resume``) in the background."""
        found = f"{self._hooks}{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        self.process = psutil.Popen(
            [sys.executable, "-m", "pilaf_ray", "train", *self._words, *words],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": found,
                "PILAF_CHAOS_FOLDER": str(self.orders),
                "PILAF_CHAOS_DISK": str(self.path.parent),
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_stop_with_parent,
        )

    def runs(self) -> bool:
        """Whether the run's outermost process lives."""
        return self.process.is_running() and self.process.poll() is None

    def victim(self, role: str) -> psutil.Process | None:
        """A process of ``role``, or None where there is none just now."""
        if role == "controller":
            # With run.restarts the outermost process only waits for its only child.
            children = self.process.children() if self.runs() else []
            return children[0] if len(children) == 1 else None
        return next((p for p in self._descendants() if title(p).startswith(ROLES[role])), None)

    def roles(self) -> list[str]:
        """The roles that have a process."""
        titles = [title(process) for process in self._descendants()]
        return ["controller", *(r for r, start in ROLES.items() if start and any(t.startswith(start) for t in titles))]

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """Every process of the run with its role; Ray's own are called ``ray gcs_server`` and the like."""
        driver = self.victim("controller") or self.process
        named = [("controller", driver)]
        for process in self._descendants():
            called = title(process)
            role = next((role for role, start in ROLES.items() if start and called.startswith(start)), None)
            if process.pid != driver.pid:
                named.append((role or own_name(called), process))
        return named

    def strike(self, victim: psutil.Process, kind: str) -> None:
        """At once."""
        hooks.strike(victim.pid, kind, self.orders)

    def set_trap(self, pid: int, fault: Fault) -> None:
        """Whichever process of the run enters the moment next strikes ``pid``; 0 is itself."""
        whole = self.orders / "trap.tmp"
        whole.write_text(json.dumps({"pid": pid, "fault": fault.kind, "delay": fault.delay}))
        whole.rename(self.orders / f"trap-{fault.moment}")

    def sprung(self, fault: Fault) -> float | None:
        """When the trap struck; None where it has not yet."""
        file = self.orders / f"sprung-{fault.moment}"
        if not file.exists():
            return None
        moment: float = json.loads(file.read_text())["time"]
        file.unlink()
        return moment

    def remove_traps(self) -> None:
        """Orders that nobody has taken are forgotten."""
        for file in self.orders.iterdir():
            file.unlink(missing_ok=True)

    def last_step(self) -> int:
        """The newest step in metrics.jsonl; 0 before the first. Reads the end of the file only."""
        record = _last_line(self.path / "metrics.jsonl")
        return 0 if record is None else int(record["step"])

    def steps(self) -> list[int]:
        """Steps in metrics.jsonl."""
        return [record["step"] for record in _lines(self.path / "metrics.jsonl")]

    def event_mark(self) -> int:
        """Where the next event will stand."""
        file = self.path / "events.jsonl"
        return file.stat().st_size if file.exists() else 0

    def events(self, since: int) -> list[dict[str, Any]]:
        """Events after a mark."""
        return _lines(self.path / "events.jsonl", since=since)

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Until ``condition`` holds; raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened within {seconds:g} s; see {self.path}")
            time.sleep(0.1)

    def stop(self, seconds: float) -> int:
        """SIGTERM, as a scheduler sends it; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return int(self.process.wait(seconds))

    def end(self) -> None:
        """Nothing is left behind."""
        for process in [*self._descendants(), self.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        out_of_memory.tidy()

    def _descendants(self) -> list[psutil.Process]:
        try:
            return [process for process in self.process.children(recursive=True) if _is_own(process)]
        except psutil.NoSuchProcess:
            return []


def _stop_with_parent() -> None:
    """In the child: SIGTERM when its parent dies, however that happens; the run would go on for ever otherwise."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_nothing_behind() -> None:
    """Let SIGTERM, as ``timeout`` sends it, end this process by an exception: what is started is ended on the way."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def _is_own(process: psutil.Process) -> bool:
    """Not a role of somebody else's run that has joined this one's cluster, as ``RAY_ADDRESS=auto`` does."""
    try:
        return process.environ().get("RAY_JOB_ID", "") in OWN_JOBS
    except psutil.Error:
        return False


def title(process: psutil.Process) -> str:
    """How a process calls itself; nothing where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def own_name(called: str) -> str:
    """Of a process of Ray's, by its command line: the program, or the script that Python runs."""
    program, *words = called.split() or ["process"]
    scripts = [word for word in words if word.endswith(".py")] if "python" in program else []
    return f"ray {Path((scripts or [program])[0]).stem.removeprefix('ray::')}"


def _lines(path: Path, *, since: int = 0) -> list[dict[str, Any]]:
    """JSON lines from a byte on; one that is being written is left for the next time."""
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(since)
        return [json.loads(line) for line in stream.read().splitlines(keepends=True) if line.endswith(b"\n")]


def _last_line(path: Path, *, longest: int = 1 << 15) -> dict[str, Any] | None:
    """The last whole line of JSON lines, each shorter than ``longest`` bytes; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 2 * longest))
        whole = [line for line in stream.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    found: dict[str, Any] | None = json.loads(whole[-1]) if whole else None
    return found
