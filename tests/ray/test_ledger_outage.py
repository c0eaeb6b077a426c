"""A ledger on a PostgreSQL server that goes away and comes back, behind the run's handle of its store."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pairs import label, pair, plan, reference
from postgres_server import PostgresServer, postgres_server

from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.launch import RoleLauncher
from pilaf_ray.errors import GivenUpError
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.types import PairState


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as found, ray_cluster(address=None, num_cpus=2):
        yield found


class Records:
    """The run's events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, event: str, **details: Any) -> None:
        assert details["role"] == "preference store"
        self.events.append((event, details.get("cause", "")))

    def count(self, event: str) -> int:
        return [name for name, _ in self.events].count(event)


def launcher(tmp_path: Path, records: Records, *, failures: int) -> RoleLauncher:
    policy = SupervisionPolicy(first_pause=0.05, longest_pause=0.1, failures_in_a_row=failures)
    return RoleLauncher(logs=str(tmp_path / "logs"), call_seconds=60.0, policy=policy, report=records)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)  # polling other processes, not ordering work


async def test_the_ledger_goes_on_when_its_server_is_back(tmp_path: Path, server: PostgresServer) -> None:
    records = Records()
    store = await launcher(tmp_path, records, failures=1000).store(server.url, "goes-on")
    await store.add_plans([plan(number) for number in range(4)])
    await asyncio.to_thread(server.stop)
    under_way = [asyncio.ensure_future(store.add_responses([pair(number)])) for number in range(4)]
    # The loss, and a replacement that found no server.
    await until(lambda: records.count("replacement failed"))
    assert not any(call.done() for call in under_way)
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(60):
        await asyncio.gather(*under_way)
    await store.add_responses([pair(0)])
    await store.add_labels([label(1)], [reference(1)])
    counts = (await store.counts()).check()
    assert (counts.planned, counts[PairState.SAMPLED], counts[PairState.LABELED], counts.labels) == (4, 3, 1, 1)
    assert records.count("replica lost") == records.count("replica replaced") == 1
    assert "the ledger postgresql+psycopg://pilaf@127.0.0.1" in records.events[0][1]
    await store.close()


async def test_a_server_that_stays_away_is_given_up_with_the_first_cause(
    tmp_path: Path, server: PostgresServer
) -> None:
    records = Records()
    store = await launcher(tmp_path, records, failures=2).store(server.url, "given-up")
    await store.add_plans([plan(0)])
    await asyncio.to_thread(server.stop)
    try:
        with pytest.raises(GivenUpError, match=r"failed 2 times in a row; first: the ledger .* cannot be written"):
            async with asyncio.timeout(60):
                await store.add_responses([pair(0)])
    finally:
        await asyncio.to_thread(server.start)
    await store.close()
