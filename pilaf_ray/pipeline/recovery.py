"""A learner group that is lost: rebuilt, put back to its checkpoint, and the run goes on."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from pilaf_ray.errors import RoleLostError
from pilaf_ray.pipeline.stopping import StopRequestedError, StopRequests
from pilaf_ray.pipeline.supervision import CircuitBreaker, Report, SupervisionPolicy, no_report

Work = TypeVar("Work")


async def train_through_losses(
    work: Work,
    *,
    train: Callable[[Work], Awaitable[int]],
    rebuild: Callable[[], Awaitable[Work]],
    furthest_step: Callable[[], int],
    policy: SupervisionPolicy,
    stop: StopRequests,
    report: Report = no_report,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> int | None:
    """Call ``train(work)`` until it returns, with what ``rebuild`` restores after each loss of the learner.

    None where somebody asked to stop while there was no learner: the newest checkpoint is what there is to keep, and
    nothing that a rebuilt learner could do would be newer.

    Losses are in a row unless the run got further than before between them: steps that a rollback
    repeats are no success, or a step that always kills the learner would be tried for ever.

    Raises:
        GivenUpError: too many losses in a row, or groups that could not be started; tells the first.
    """
    breaker = CircuitBreaker("policy learner", limit=policy.failures_in_a_row)
    reached = furthest_step()
    while True:
        try:
            return await train(work)
        except RoleLostError as error:
            cause = error
        if furthest_step() > reached:
            reached = furthest_step()
            breaker.succeeded()
        started = clock()
        restored = False
        while not restored:
            breaker.failed(cause)
            report("learner lost", step=reached, cause=str(cause))
            if breaker.is_open:
                given_up = breaker.error()
                report("given up", role="policy learner", cause=str(given_up))
                raise given_up from cause
            try:
                await stop.unless_requested(partial(sleep, policy.pause(breaker.failures)))
                work = await stop.unless_requested(rebuild)
                restored = True
            except StopRequestedError:
                return None
            except RoleLostError as error:
                cause = error
        report("learner rebuilt", seconds=clock() - started)
