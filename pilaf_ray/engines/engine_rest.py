"""An engine that leaves its device to others for a while: vLLM's sleep where there is one, a pause where there is none.

Sleep frees the KV cache and moves the weights to host memory; it exists on GPUs. On CPUs the engine is paused and its
cache is emptied, but the memory of cache and weights stays: device and host are the same there.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

WEIGHTS_KEPT = 1
"""vLLM's level of sleep after which the same weights are served again."""


def can_sleep() -> bool:
    """Whether vLLM can free this machine's device under a living engine."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_sleep_mode_available())


async def rest(engine: "AsyncLLM", *, sleeps: bool) -> None:
    """Stop computing and free what can be freed.

    Requests that are still there are aborted: whoever asked has an answer or went away, or it would not be another's
    turn.
    """
    if sleeps:
        await engine.sleep(level=WEIGHTS_KEPT, mode="abort")
    else:
        await engine.pause_generation(mode="abort", clear_cache=True)


async def resume(engine: "AsyncLLM", *, sleeps: bool) -> None:
    """Take what was freed again, and compute."""
    if sleeps:
        await engine.wake_up()
    else:
        await engine.resume_generation()
