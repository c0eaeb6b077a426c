"""The end of an engine that is meant to end."""

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


async def end_engine(engine: "AsyncLLM") -> None:
    """End the engine's processes; requests under way fail.

    vLLM's reader of outputs takes the end for a crash and logs it as an error with a stack trace, which would
    alarm whoever reads the log of a run that has come to its end: that record is left out.
    """
    log = logging.getLogger("vllm.v1.engine.async_llm")
    log.addFilter(_is_no_end_of_outputs)
    try:
        await asyncio.to_thread(engine.shutdown)
        if engine.output_handler is not None:
            await asyncio.gather(engine.output_handler, return_exceptions=True)
    finally:
        log.removeFilter(_is_no_end_of_outputs)


def _is_no_end_of_outputs(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("AsyncLLM output_handler failed")
