"""vLLM's worker inside the engine's own process, for a single CPU worker.

vLLM puts a CPU worker into a process of its own so that it can set the worker's OpenMP
environment, and the engine then polls shared memory for the worker's answer: a busy
loop on a core that the other roles need. The generator sets the environment before the
engine starts, so the worker can live in the engine's process, with nothing to poll.
"""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from pilaf_ray.engines.core_share import CoreShare

THREADS_KEY = "pilaf_ray_threads"
"""In vLLM's ``additional_config``: threads of the worker, a number or ``auto``."""


class InProcessExecutor(UniProcExecutor):
    """The single-process executor under a name that the CPU platform does not replace."""

    def _init_executor(self) -> None:
        super()._init_executor()
        self._cores = CoreShare(self.vllm_config.additional_config[THREADS_KEY])

    def execute_model(self, *given: Any, **named: Any) -> Any:
        """One step, on as many cores as there are for it."""
        self._cores.adapt()
        return super().execute_model(*given, **named)


def choose_executor(tensor_parallel_size: int) -> type[InProcessExecutor] | None:
    """One CPU worker lives in the engine's process; for the rest vLLM chooses (None)."""
    return InProcessExecutor if tensor_parallel_size == 1 and current_platform.is_cpu() else None
