"""More or fewer replicas while a run goes on: a request in the run folder, taken up by the run.

pilaf-ray scale ─▶ RUN/scale.json ─▶ the run takes it away, and the pool grows or shrinks
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from pilaf_ray.pipeline.supervision import Report

NAME = "scale.json"
SECONDS = 1.0


def ask_for_generators(run: Path, count: int) -> None:
    """Leave a request for ``count`` generators in the run folder; it replaces one that nobody has taken yet."""
    draft = run / f"{NAME}.tmp"
    draft.write_text(json.dumps({"generators": count}))
    draft.replace(run / NAME)


def take_request(run: Path) -> int | None:
    """The number of generators that somebody asks for, once."""
    try:
        # Away first: a request that comes now is not lost with this one.
        taken = (run / NAME).rename(run / f"{NAME}.taken")
    except FileNotFoundError:
        return None
    count = int(json.loads(taken.read_text())["generators"])
    taken.unlink()
    return count


@contextlib.asynccontextmanager
async def scaled_on_request(
    run: Path,
    resize: Callable[[int], Awaitable[int]],
    *,
    report: Report,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[None]:
    """Look for requests every second while the block runs.

    Args:
        resize: makes a pool of so many replicas; returns how many there are then.
    """

    async def follow() -> None:
        while True:
            asked = take_request(run)
            if asked is not None:
                report("scaling", generators=asked)
                report("scaled", asked=asked, generators=await resize(asked))
            await sleep(SECONDS)

    following = asyncio.create_task(follow(), name="scale requests")
    try:
        yield
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
