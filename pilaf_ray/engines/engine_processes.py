"""The processes of an engine, seen from outside: for the moments in which it cannot be asked whether it lives."""

import asyncio
from collections.abc import Sequence

import psutil

from pilaf_ray.errors import RoleLostError

TITLE = "VLLM::"
"""How vLLM's processes call themselves."""
LOOK_SECONDS = 0.2


class EngineProcesses:
    """Those that this process had started when the object was made.

    While an engine takes new weights it answers nothing else, and vLLM lets a call to an engine that has died wait for
    ever; the update's deadline would be the first to notice, minutes later.
    """

    def __init__(self) -> None:
        self._processes = [process for process in psutil.Process().children(recursive=True) if _is_engine(process)]

    async def alive(self) -> None:
        """Return once none of them is stopped; raises RoleLostError where one is gone."""
        while psutil.STATUS_STOPPED in self._states():
            await asyncio.sleep(LOOK_SECONDS)

    def _states(self) -> Sequence[str]:
        states = []
        for process in self._processes:
            try:
                state = process.status()
            except psutil.NoSuchProcess:
                state = psutil.STATUS_DEAD
            if state in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
                raise RoleLostError(f"the engine's process {process.pid} has died while it took new weights")
            states.append(state)
        return states


def _is_engine(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith(TITLE)
    except psutil.NoSuchProcess:
        return False
