"""Functions that tests name as oracles."""

import os
import time
from collections.abc import Sequence
from pathlib import Path


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(response)) for response in responses]


async def lengths_async(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return lengths(prompts, responses)


def first(prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    return [1.0] * len(prompts)


def abstains(prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[None]:
    return [None] * len(prompts)


def raises(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    raise ValueError("no idea")


def not_a_number(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float("nan")] * len(responses)


def too_few(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [0.0]


def lengths_in_folder(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Misbehaves as the files in ``$ORACLE_FOLDER`` say; ``poison`` in a response kills the process."""
    folder = Path(os.environ["ORACLE_FOLDER"])
    if (folder / "outage").exists():
        raise ConnectionError("the line is down")
    if any("poison" in response for response in responses):
        os._exit(1)
    (folder / f"asked-{os.getpid()}").touch()
    while (folder / "hold").exists():
        time.sleep(0.01)  # another process lets go, or kills this one
    return lengths(prompts, responses)
