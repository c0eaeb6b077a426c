"""What vLLM reads from the environment of the process that starts an engine, and hands on to the engine's own."""

import os

from pilaf_ray.threads import Threads, starting_threads


def prepare_environment(*, cpu_threads: Threads, enforce_eager: bool) -> None:
    """Set it; to be called before the first import of vLLM.

    Args:
        cpu_threads: threads of the engine's operators on CPUs.
        enforce_eager: nothing is to be compiled at run time.
    """
    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(starting_threads(cpu_threads)),
        # vLLM compiles some helpers in spite of its own enforce_eager. That costs seconds at every start and needs a
        # compiler, and an object that a killed process left half written fails every later engine on the node.
        TORCH_COMPILE_DISABLE=str(int(enforce_eager)),
        # The processors are written for Model Runner V1.
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_NO_USAGE_STATS="1",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # It would override kv_cache_memory_bytes, and takes whole GiB only.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
