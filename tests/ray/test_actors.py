"""Roles behind real Ray actors on a small cluster: messages, errors, deadlines and deaths."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from pairs import label, pair, plan, reference

from pilaf_ray.actors.calls import call
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.launch import RoleLauncher, RoleResources
from pilaf_ray.errors import LedgerError, OracleError, RoleLostError
from pilaf_ray.store.records import UnfinishedWork
from pilaf_ray.types import LabeledPair, PairState

NOTHING = RoleResources(num_cpus=0.0, num_gpus=0.0, threads=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Where workers find the functions that tests name as oracles.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "unit"))
        with ray_cluster(address=None, num_cpus=2):
            yield


@pytest.fixture
def launcher(tmp_path: Path) -> RoleLauncher:
    return RoleLauncher(logs=str(tmp_path / "logs"), call_seconds=60.0)


def oracle_arguments(target: str) -> dict[str, object]:
    return {"target": target, "kind": "score", "scale": 1.0, "label_rule": {"type": "argmax"}}


async def test_messages_cross_unchanged_and_survive_the_death_of_the_store(
    launcher: RoleLauncher, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    store = await launcher.store(url)
    await store.add_plans([plan(0), plan(1)])
    await store.add_responses([pair(0), pair(1)])
    await store.add_labels([label(0)], [reference(0)])
    ray.kill(store._pool.living()[0])
    assert await store.unfinished() == UnfinishedWork(
        planned=[],
        sampled=[pair(1)],
        labeled=[LabeledPair(pair=pair(0), label=label(0), reference=reference(0))],
    )
    with pytest.raises(LedgerError, match="is sampled"):
        await store.mark_trained(1, ["pair-1"])
    assert (await store.counts())[PairState.LABELED] == 1


async def test_oracle_replicas_take_turns_and_their_errors_arrive_as_themselves(launcher: RoleLauncher) -> None:
    arguments = oracle_arguments("pilaf_ray.oracle.sentiment:score")
    oracle = await launcher.oracle("function", arguments, replicas=2, resources=NOTHING)
    pairs = [pair(0, a="a lovely day", b="an awful day"), pair(1, a="terrible", b="wonderful")]
    labels = [await oracle.label(pairs) for _ in range(2)]
    assert labels[0] == labels[1]
    assert [given.probability for given in labels[0]] == [1.0, 0.0]
    broken = await launcher.oracle(
        "function", oracle_arguments("oracle_functions:raises"), replicas=1, resources=NOTHING
    )
    with pytest.raises(OracleError, match="no idea"):
        await broken.label(pairs)
    with pytest.raises(RoleLostError, match=r"oracle 0 has died \(.*nowhere.*\); see its log"):
        await launcher.oracle("function", oracle_arguments("nowhere:score"), replicas=1, resources=NOTHING)


async def test_a_role_that_does_not_answer_is_named() -> None:
    with pytest.raises(RoleLostError, match="reference-3 did not answer within 0 s; see its log"):
        await call(asyncio.Event().wait(), role="reference-3", seconds=0.01)


async def test_threads_and_allocator_reach_the_process(launcher: RoleLauncher) -> None:
    @ray.remote(num_cpus=0)
    class Probe:
        def environment(self) -> dict[str, str]:
            import os

            return dict(os.environ)

    resources = RoleResources(num_cpus=0.0, num_gpus=0.0, threads=3)
    found = await Probe.options(**resources.options()).remote().environment.remote()
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["MALLOC_MMAP_MAX_"] == "0"
    assert "hugetlb=1" in found["GLIBC_TUNABLES"]
