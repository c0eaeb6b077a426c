"""Calls that end with their replica."""

import asyncio

import pytest

from pilaf_ray.errors import RoleLostError
from pilaf_ray.pipeline.departure import Departure


async def test_calls_end_with_the_replica_and_finished_ones_keep_their_answers() -> None:
    departure, finish, cancelled = Departure(), asyncio.Event(), []

    async def work(number: int) -> int:
        try:
            if number:
                await asyncio.Event().wait()
            await finish.wait()
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    calls = [asyncio.create_task(departure.unless_gone(work(number))) for number in range(3)]
    finish.set()
    assert await calls[0] == 0
    error = RoleLostError("killed")
    departure.happen(error)
    departure.happen(RoleLostError("found dead later"))
    assert await asyncio.gather(*calls[1:], return_exceptions=True) == [error, error]
    assert sorted(cancelled) == [1, 2] and departure.error is error
    with pytest.raises(RoleLostError, match="killed"):
        await departure.unless_gone(work(4))


async def test_an_answer_that_is_there_counts_more_than_the_departure() -> None:
    departure = Departure()

    async def work() -> str:
        departure.happen(RoleLostError("at the same moment"))
        return "answer"

    assert await departure.unless_gone(work()) == "answer"


async def test_errors_and_cancellation_of_a_call_are_its_own() -> None:
    departure = Departure()

    async def fails() -> None:
        raise ValueError("bad input")

    with pytest.raises(ValueError, match="bad input"):
        await departure.unless_gone(fails())
    ended = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    call = asyncio.create_task(departure.unless_gone(waits()))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert departure.error is None
