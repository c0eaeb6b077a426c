"""More or fewer replicas while a run goes on: a request in the run folder, taken up by the run.

pilaf-ray scale ─▶ RUN/scale.json ─▶ the run takes it away, and the pool grows or shrinks
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pilaf_ray.errors import ConfigError, PilafError, RunFolderError
from pilaf_ray.pipeline.background import beside
from pilaf_ray.pipeline.supervision import Report

NAME = "scale.json"
SECONDS = 1.0


class ScaleRequest(BaseModel):
    """What the file holds.

    Example: ``{"generators": 4}``
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    generators: int = Field(ge=1)


def ask_for_generators(run: Path, count: int) -> None:
    """Leave a request for ``count`` generators in the run folder; it replaces one that nobody has taken yet."""
    draft = run / f"{NAME}.tmp"
    draft.write_text(ScaleRequest(generators=count).model_dump_json())
    draft.replace(run / NAME)


def take_request(run: Path) -> int | None:
    """The number of generators that somebody asks for, once.

    Raises:
        ConfigError: what was asked for is no such number; it is taken away, too.
        RunFolderError: the file cannot be read.
    """
    taken = run / f"{NAME}.taken"
    try:
        # Away first: a request that comes now is not lost with this one.
        (run / NAME).rename(taken)
        text = taken.read_bytes()
        taken.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(f"{run / NAME} cannot be taken up: {error}") from error
    try:
        return ScaleRequest.model_validate_json(text).generators
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"{run / NAME}: {where}{': ' if where else ''}{problem['msg']}; write it with pilaf-ray scale"
        ) from error


def scaled_on_request(
    run: Path,
    resize: Callable[[int], Awaitable[int]],
    *,
    report: Report,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AbstractAsyncContextManager[None]:
    """Look for requests every second while the block runs; one that fails is reported, with its cause, and is over.

    Args:
        resize: makes a pool of so many replicas; returns how many there are then.
    """

    async def look() -> None:
        asked = take_request(run)
        if asked is not None:
            report("scaling", generators=asked)
            report("scaled", asked=asked, generators=await resize(asked))

    async def follow() -> None:
        while True:
            try:
                await look()
            except PilafError as error:
                report("not scaled", cause=str(error))
            await sleep(SECONDS)

    return beside(follow(), name="scale requests")
