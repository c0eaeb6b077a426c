"""Work beside a block: it ends with the block, and its faults end the block at once and as themselves."""

import asyncio

import pytest

from pilaf_ray.errors import GuardError
from pilaf_ray.pipeline.background import beside


async def forever() -> None:
    await asyncio.Event().wait()


async def broken() -> None:
    raise TypeError("a bug")


async def test_work_ends_with_the_block() -> None:
    async with beside(forever(), name="work"):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_fault_ends_the_block_that_would_wait_for_ever() -> None:
    with pytest.raises(TypeError, match="a bug"):
        async with asyncio.timeout(10), beside(broken(), name="work"):
            await forever()
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_inner_of_two_is_left_first() -> None:
    with pytest.raises(TypeError, match="a bug"):
        async with asyncio.timeout(10), beside(broken(), name="outer"), beside(forever(), name="inner"):
            await forever()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("error", [GuardError("loss"), TimeoutError("of the block's own"), asyncio.CancelledError()])
async def test_the_blocks_own_error_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        async with beside(forever(), name="work"):
            raise error
    assert caught.value is error
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_fault_of_the_last_moment_is_not_lost() -> None:
    async def breaks_when_ended() -> None:
        try:
            await forever()
        finally:
            raise TypeError("a bug at the end")

    with pytest.raises(TypeError, match="at the end"):
        async with beside(breaks_when_ended(), name="work"):
            await asyncio.sleep(0)
