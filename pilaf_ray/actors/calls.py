"""One remote call: its deadline, and what its failures mean."""

import asyncio
import time
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError, TaskCancelledError

from pilaf_ray.errors import PilafError, RoleLostError
from pilaf_ray.observability.call_trace import traced
from pilaf_ray.pipeline.supervision import ProgressWatch

T = TypeVar("T")


class RoleDiedError(RoleLostError):
    """The process of a role is gone or out of reach: never the consequence of another role's failure."""


async def call(
    reference: Awaitable[T], *, role: str, seconds: float, name: str = "", watch: ProgressWatch | None = None
) -> T:
    """Await a remote result; our own errors arrive as themselves, without Ray's wrapping.

    ``name`` is what the call is called in a trace; calls without one are in none. With a ``watch`` the deadline
    counts from when the role last got on with its work.

    Whatever else goes wrong is a RoleLostError: the replica is of no more use. A call that is
    given up is cancelled where it runs, so that it does not stand in the way of its repetition.
    """
    patience: AbstractAsyncContextManager[object] = (
        asyncio.timeout(seconds) if watch is None else _Patience(seconds, watch)
    )
    try:
        with traced(role, name):
            async with patience:
                return await reference
    except TimeoutError as error:
        _cancel(reference)
        raise RoleLostError(f"{role} did not answer within {seconds:.0f} s; see its log") from error
    except asyncio.CancelledError:
        _cancel(reference)
        raise
    except (RayTaskError, TaskCancelledError) as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, PilafError):
            raise cause from None
        raise RoleLostError(f"{role} failed ({type(cause).__name__}: {_last_line(cause)}); see its log") from error
    except ActorUnavailableError as error:
        # The connection broke. What the call did there nobody knows, and a rank's part of a collective is lost with it.
        raise RoleDiedError(f"{role} is cut off ({_last_line(error)}); see its log") from error
    except RayActorError as error:
        # Ray's text ends with the cause: the last line of a traceback, or how the process ended.
        raise RoleDiedError(f"{role} has died ({_last_line(error)}); see its log") from error
    except RayError as error:
        raise RoleLostError(f"{role} cannot be reached ({_last_line(error)}); see its log") from error


class _Patience:
    """A block that ends with TimeoutError once there was no progress for ``seconds``."""

    def __init__(self, seconds: float, watch: ProgressWatch) -> None:
        self._seconds, self._watch = seconds, watch
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._since = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def _look(self) -> None:
        loop, left = asyncio.get_running_loop(), self._watch.left(self._since, seconds=self._seconds)
        if left > 0:
            self._timer = loop.call_later(left, self._look)
        else:
            self._timeout.reschedule(loop.time())

    async def __aexit__(self, *error: Any) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(*error)


async def end_actor(actor: Any) -> None:
    """Kill an actor, whatever state it is in; Ray follows up where the process is stopped."""
    ray.kill(actor)


def _cancel(reference: object) -> None:
    if isinstance(reference, ray.ObjectRef):
        ray.cancel(reference)


def _last_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[-1]
    # Ray appends advice that is longer than what it is about.
    return line.partition("Some common causes include")[0].strip()
