"""Lets the chaos harness make any process of a run raise an error in its next piece of work.

Python imports this module at the start of every process that has its folder on PYTHONPATH. A file named like
the process's id in ``$PILAF_CHAOS_FOLDER`` is the order to raise; it is removed when it is taken.
"""

import functools
import inspect
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

# What each role does for the run: module, class, method.
WORK = (
    ("pilaf_ray.engines.generator", "Generator", "generate"),
    ("pilaf_ray.engines.reference", "ReferenceModel", "score"),
    ("pilaf_ray.oracle.function", "FunctionOracle", "label"),
    ("pilaf_ray.engines.learner", "PolicyLearner", "train_step"),
    ("pilaf_ray.store.ledger", "PreferenceLedger", "add_responses"),
    ("pilaf_ray.pipeline.controller", "Controller", "_wait_for_batch"),
)


def _break_once(owner: type, name: str) -> None:
    """The next call raises; those after it are as before."""
    original = getattr(owner, name)

    def fail() -> None:
        setattr(owner, name, original)
        raise RuntimeError("injected by the chaos harness")

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def broken(*_arguments: Any, **_settings: Any) -> None:
            fail()
    else:

        @functools.wraps(original)
        def broken(*_arguments: Any, **_settings: Any) -> None:
            fail()

    setattr(owner, name, broken)


def _obey(order: Path) -> None:
    while True:
        time.sleep(0.1)
        if order.exists():
            order.unlink()
            for module, owner, name in WORK:
                found = getattr(sys.modules.get(module), owner, None)
                if found is not None:
                    _break_once(found, name)


if "PILAF_CHAOS_FOLDER" in os.environ:
    threading.Thread(
        target=_obey, args=(Path(os.environ["PILAF_CHAOS_FOLDER"]) / str(os.getpid()),), daemon=True
    ).start()
