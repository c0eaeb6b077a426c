"""Lets the chaos harness strike any process of a run, also at the moment at which the run does a certain thing.

Python imports this module at the start of every process that has its folder on PYTHONPATH. Orders are files in
``$PILAF_CHAOS_FOLDER``:

- ``raise-PID``: that process raises an error in its next piece of work.
- ``grow-PID``: that process asks for memory.
- ``trap-PHASE``: the process that enters that phase next strikes; the file says whom, with what and how long after.

``$PILAF_CHAOS_DISK`` is the disk of the run, if it has one of its own.

The first to rename an order has taken it. A sprung trap leaves ``sprung-PHASE``, with the moment.
"""

import functools
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
GROWTH_BYTES = 64 << 20
SLOW_SECONDS = 20
# A tenth of the time is left to the process; a shell, because who strikes may be the victim.
SLOW = "for _ in $(seq {seconds}); do kill -STOP {pid}; sleep 0.9; kill -CONT {pid} || exit; sleep 0.1; done"
# What each role does for the run: module, class, method. The engine's is vLLM's own: nothing of ours is called there.
WORK = (
    ("pilaf_ray.engines.generator", "Generator", "generate"),
    ("pilaf_ray.engines.reference", "ReferenceModel", "score"),
    ("pilaf_ray.oracle.function", "FunctionOracle", "label"),
    ("pilaf_ray.engines.learner", "PolicyLearner", "train_step"),
    ("pilaf_ray.engines.reward_learner", "RewardLearner", "train_step"),
    ("pilaf_ray.store.ledger", "PreferenceLedger", "add_responses"),
    ("pilaf_ray.pipeline.controller", "Controller", "_wait_for_batch"),
    ("vllm.v1.engine.core", "EngineCoreProc", "_process_engine_step"),
)
# What is called when a phase begins: phase, module, class, method.
PHASES = (
    ("sampling", "pilaf_ray.engines.generator", "Generator", "generate"),
    ("labelling", "pilaf_ray.oracle.function", "FunctionOracle", "label"),
    ("labelling.commit", "pilaf_ray.store.ledger", "PreferenceLedger", "add_labels"),
    ("training", "pilaf_ray.engines.learner", "PolicyLearner", "train_step"),
    ("training.commit", "pilaf_ray.store.ledger", "PreferenceLedger", "mark_trained"),
    ("weight sync.push", "pilaf_ray.engines.weight_files", "FilesystemPublisher", "publish"),
    ("weight sync.push", "pilaf_ray.engines.weight_publishers", "PeerPublisher", "publish"),
    ("weight sync.push", "pilaf_ray.engines.shared_weights", "SharedMemoryPublisher", "publish"),
    ("weight sync.pull", "pilaf_ray.engines.generator", "Generator", "update_weights"),
    ("checkpoint.write", "pilaf_ray.engines.learner", "PolicyLearner", "save"),
    ("checkpoint.publish", "pilaf_ray.engines.checkpoint", "CheckpointStore", "_publish"),
    ("resume.load", "pilaf_ray.engines.learner", "PolicyLearner", "load"),
)
_INJECTED = "injected by the chaos harness"


def _before(owner: type, name: str, act: Callable[[], None]) -> None:
    """Let ``act`` run before each call of a method."""
    original = getattr(owner, name)
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def wrapped(*arguments: Any, **settings: Any) -> Any:
            act()
            return await original(*arguments, **settings)
    else:

        @functools.wraps(original)
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            act()
            return original(*arguments, **settings)

    setattr(owner, name, wrapped)


class Orders:
    """The folder of orders, as one process sees it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._wrapped: set[tuple[str, ...]] = set()
        self._broken = False

    def watch(self) -> None:
        """Follow orders until the process ends."""
        while True:
            time.sleep(POLL_SECONDS)
            for phase, *place in PHASES:
                self._wrap(phase, place, functools.partial(self._enter, phase))
            for owned in WORK:
                self._wrap("work", owned, self._raise)
            if _taken(self._folder / f"raise-{os.getpid()}") is not None:
                self._broken = True
            if _taken(self._folder / f"grow-{os.getpid()}") is not None:
                self._ballast = bytearray(GROWTH_BYTES)

    def _wrap(self, purpose: str, place: Sequence[str], act: Callable[[], None]) -> None:
        """Once the module is there."""
        module, owner, name = place
        found = getattr(sys.modules.get(module), owner, None)
        if found is not None and hasattr(found, name) and (purpose, *place) not in self._wrapped:
            self._wrapped.add((purpose, *place))
            _before(found, name, act)

    def _raise(self) -> None:
        if self._broken:
            self._broken = False
            raise RuntimeError(_INJECTED)

    def _enter(self, phase: str) -> None:
        order = _taken(self._folder / f"trap-{phase}")
        if order is None:
            return
        pid, fault, delay = order["pid"] or os.getpid(), order["fault"], order["delay"]
        if delay:
            threading.Timer(delay, self._strike, (phase, pid, fault)).start()
            return
        if fault == "exception" and pid == os.getpid():
            self._sprung(phase)
            raise RuntimeError(_INJECTED)
        self._strike(phase, pid, fault)

    def _strike(self, phase: str, pid: int, fault: str) -> None:
        self._sprung(phase)
        try:
            strike(pid, fault, self._folder)
        except ProcessLookupError:
            return

    def _sprung(self, phase: str) -> None:
        whole = self._folder / f"sprung-{phase}.tmp"
        whole.write_text(json.dumps({"time": time.time()}))
        whole.rename(self._folder / f"sprung-{phase}")


def strike(pid: int, fault: str, folder: Path) -> None:
    """Do ``fault`` to process ``pid``; raises ProcessLookupError where it is gone."""
    if fault == "exception":
        os.kill(pid, 0)
        (folder / f"raise-{pid}").write_text("{}")
    elif fault == "out of memory":
        from benchmarks import out_of_memory

        out_of_memory.starve(pid)
        (folder / f"grow-{pid}").write_text("{}")
    elif fault == "network cut":
        from benchmarks import network_cut

        network_cut.cut(pid)
    elif fault == "full disk":
        from benchmarks import small_disk

        small_disk.fill(Path(os.environ["PILAF_CHAOS_DISK"]))
    elif fault == "slow":
        os.kill(pid, 0)
        subprocess.Popen(["sh", "-c", SLOW.format(seconds=SLOW_SECONDS, pid=pid)], start_new_session=True)
    else:
        os.kill(pid, getattr(signal, fault))


def _taken(order: Path) -> Any:
    """What a file says, if this process is the first to take it; None where there is none."""
    if not order.exists():
        return None
    mine = order.with_name(f"taken-{os.getpid()}-{order.name}")
    try:
        order.rename(mine)
    except FileNotFoundError:
        return None
    found = json.loads(mine.read_text())
    mine.unlink()
    return found


if "PILAF_CHAOS_FOLDER" in os.environ:
    threading.Thread(target=Orders(Path(os.environ["PILAF_CHAOS_FOLDER"])).watch, daemon=True).start()
