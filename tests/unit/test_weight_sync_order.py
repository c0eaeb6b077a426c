"""Push, then every pull, then the probe; failures name the phase and leave nothing running."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pilaf_ray.errors import RoleLostError, WeightSyncError
from pilaf_ray.pipeline.weight_sync import WeightSync


class Roles:
    """A learner and two generators that write down what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def push(self, version: int) -> str:
        self.events.append(f"push {version}")
        return f"update {version}"

    def pull(self, replica: int) -> Callable[[str], Awaitable[None]]:
        async def pull(update: str) -> None:
            await asyncio.sleep(0)
            self.events.append(f"{replica} pulls {update}")

        return pull

    async def probe(self, version: int, update: str) -> None:
        self.events.append(f"probe {version} against {update}")


async def never(_: object) -> None:
    await asyncio.Event().wait()


async def test_order_is_push_pull_probe() -> None:
    roles = Roles()
    sync = WeightSync(
        push=roles.push, pulls=lambda: {0: roles.pull(0), 1: roles.pull(1)}, probe=roles.probe, deadline_seconds=5
    )
    await sync.serve(7, await sync.push(7))
    assert roles.events == ["push 7", "0 pulls update 7", "1 pulls update 7", "probe 7 against update 7"]


async def test_a_pull_that_hangs_is_named_and_stops_before_the_probe() -> None:
    roles = Roles()
    sync = WeightSync(
        push=roles.push, pulls=lambda: {0: roles.pull(0), 1: never}, probe=roles.probe, deadline_seconds=0.02
    )
    with pytest.raises(WeightSyncError, match="version 7: pull by generator 1 took longer"):
        await sync.serve(7, await sync.push(7))
    assert not any(event.startswith("probe") for event in roles.events)


async def test_a_failed_pull_ends_the_others() -> None:
    async def breaks(_: object) -> None:
        raise WeightSyncError("checksum differs")

    sync = WeightSync(push=Roles().push, pulls=lambda: {0: never, 1: breaks}, probe=None, deadline_seconds=5)
    with pytest.raises(WeightSyncError, match="checksum differs"):
        await sync.serve(1, await sync.push(1))
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_generator_that_cannot_pull_is_recovered_and_the_others_are_probed() -> None:
    roles, recovered = Roles(), []

    async def breaks(_: object) -> None:
        raise RoleLostError("generator-1 has died")

    async def recover(replica: int, update: str, error: Exception) -> None:
        recovered.append((replica, update, str(error)))

    sync = WeightSync(
        push=roles.push,
        announce=lambda update: roles.events.append(f"announce {update}"),
        pulls=lambda: {0: roles.pull(0), 1: breaks, 2: never},
        recover=recover,
        probe=roles.probe,
        deadline_seconds=0.05,
    )
    await sync.serve(7, await sync.push(7))
    assert roles.events == ["push 7", "announce update 7", "0 pulls update 7", "probe 7 against update 7"]
    assert recovered[0] == (1, "update 7", "generator-1 has died")
    assert recovered[1][0] == 2 and "pull by generator 2 took longer" in recovered[1][2]
