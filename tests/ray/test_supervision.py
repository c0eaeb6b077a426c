"""Real actors that are killed, stopped and cut off in the middle of their work."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from pairs import label, pair, plan, reference

from pilaf_ray.actors.calls import RoleDiedError, call
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.generators import GeneratorPool
from pilaf_ray.actors.handles import OraclePool
from pilaf_ray.actors.launch import RoleLauncher, RoleResources
from pilaf_ray.actors.learner_group import LearnerGroup
from pilaf_ray.actors.roles import _Generator
from pilaf_ray.actors.weights import GeneratorUpdates, PublishedWeights, make_weight_sync
from pilaf_ray.errors import OracleUnavailableError, PlacementError, PoisonPairError, RoleLostError, WeightSyncError
from pilaf_ray.heartbeat import Heartbeat
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.types import GenerationRequest, PairState, ResponsePair

NOTHING = RoleResources(num_cpus=0.0, num_gpus=0.0, threads=1)
POLICY = SupervisionPolicy(first_pause=0.05, longest_pause=0.2, heartbeat_every=0.2, heartbeat_seconds=3.0)
PATIENT = replace(POLICY, heartbeat_seconds=30.0)
"""For actors that are still starting when they are first asked."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracle")


@pytest.fixture(scope="module", autouse=True)
def cluster(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parents[1] / 'unit'}:{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("ORACLE_FOLDER", str(folder))
        with ray_cluster(address=None, num_cpus=2):
            yield


class Records(list[tuple[str, dict[str, Any]]]):
    def __call__(self, event: str, **details: Any) -> None:
        self.append((event, details))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [details for name, details in self if name == event]


def launcher(tmp_path: Path, records: Records, **settings: Any) -> RoleLauncher:
    return RoleLauncher(logs=str(tmp_path / "logs"), call_seconds=60.0, policy=POLICY, report=records, **settings)


async def oracle(tmp_path: Path, records: Records, replicas: int = 1, **settings: Any) -> OraclePool:
    arguments = {
        "target": "oracle_functions:lengths_in_folder",
        "kind": "score",
        "scale": 1.0,
        "label_rule": {"type": "argmax"},
    }
    return await launcher(tmp_path, records, **settings).oracle(
        "function", arguments, replicas=replicas, resources=NOTHING
    )


async def until(condition: Callable[[], object]) -> None:
    """Wait for another process to get somewhere."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


PAIRS: list[ResponsePair] = [pair(0, a="long answer", b="short"), pair(1, a="x", b="longer")]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_labels_survive_a_killed_and_a_stopped_oracle(
    fault: signal.Signals, tmp_path: Path, folder: Path
) -> None:
    records = Records()
    pool = await oracle(tmp_path, records)
    for old in folder.glob("asked-*"):
        old.unlink()
    (folder / "hold").touch()
    labelling = asyncio.ensure_future(pool.label(PAIRS))
    await until(lambda: list(folder.glob("asked-*")))
    os.kill(int(next(folder.glob("asked-*")).name.removeprefix("asked-")), fault)
    (folder / "hold").unlink()
    labels = await asyncio.wait_for(labelling, 60)
    assert [(given.pair_id, given.probability) for given in labels] == [("pair-0", 1.0), ("pair-1", 0.0)]
    (lost,) = records.of("replica lost")
    assert ("has died" if fault == signal.SIGKILL else "no sign of life for 3 s") in lost["cause"]
    (replaced,) = records.of("replica replaced")
    assert (replaced["role"], replaced["replica"]) == ("oracle", 0)
    await pool.close()


async def test_a_poison_pair_is_found_and_its_neighbour_is_labelled(tmp_path: Path) -> None:
    records = Records()
    pool = await oracle(tmp_path, records)
    poison = pair(2, a="poison", b="fine")
    with pytest.raises(PoisonPairError, match="one of 2 pairs"):
        await pool.label([PAIRS[0], poison])
    assert [given.pair_id for given in await pool.label([PAIRS[0]])] == ["pair-0"]
    with pytest.raises(PoisonPairError, match="pair pair-2: 3 oracle replicas were lost over it"):
        await pool.label([poison])
    await pool.close()


async def test_an_outage_is_waited_for_and_a_longer_one_is_not(tmp_path: Path, folder: Path) -> None:
    records = Records()
    pool = await oracle(tmp_path, records, outage_seconds=30.0)
    (folder / "outage").touch()
    labelling = asyncio.ensure_future(pool.label(PAIRS))
    await until(lambda: len(records.of("oracle outage")) >= 3)
    (folder / "outage").unlink()
    assert [given.pair_id for given in await labelling] == ["pair-0", "pair-1"]
    assert "the line is down" in records.of("oracle outage")[0]["cause"]
    assert not records.of("replica lost"), "an outage kills no replica"
    await pool.close()
    impatient = await oracle(tmp_path, records, outage_seconds=0.0)
    (folder / "outage").touch()
    with pytest.raises(OracleUnavailableError, match="the line is down"):
        await impatient.label(PAIRS)
    (folder / "outage").unlink()
    await impatient.close()


async def test_the_store_comes_back_on_its_file_and_a_poison_pair_is_rejected_in_it(tmp_path: Path) -> None:
    records = Records()
    store = await launcher(tmp_path, records).store(f"sqlite:///{tmp_path / 'ledger.db'}")
    await store.add_plans([plan(0), plan(1), plan(2)])
    await store.add_responses([pair(0), pair(1)])
    ray.kill(store._pool.living()[0])
    await store.add_labels([label(0)], [reference(0)])
    await store.reject("pair-1", "kills replicas")
    await store.reject("pair-1", "kills replicas")
    await store.reject("pair-2", "kills replicas")
    counts = await store.counts()
    assert (counts[PairState.LABELED], counts[PairState.REJECTED], counts[PairState.SAMPLED]) == (1, 2, 0)
    assert [details["role"] for details in records.of("replica replaced")] == ["preference store"]
    await store.close()


async def test_the_ledger_goes_on_when_its_server_is_back(tmp_path: Path) -> None:
    # Ray's workers import this module as well, and do not find that one.
    from postgres_server import postgres_server

    records, policy = Records(), replace(PATIENT, failures_in_a_row=1000)
    launched = RoleLauncher(logs=str(tmp_path / "logs"), call_seconds=60.0, policy=policy, report=records)
    with postgres_server() as server:
        store = await launched.store(server.url, "goes-on")
        await store.add_plans([plan(number) for number in range(4)])
        await asyncio.to_thread(server.stop)
        under_way = [asyncio.ensure_future(store.add_responses([pair(number)])) for number in range(4)]
        await until(lambda: records.of("replacement failed"))
        assert not any(call.done() for call in under_way)
        await asyncio.to_thread(server.start)
        await asyncio.wait_for(asyncio.gather(*under_way), 60)
        await store.add_responses([pair(0)])
        await store.add_labels([label(1)], [reference(1)])
        counts = (await store.counts()).check()
        await store.close()
    assert (counts.planned, counts[PairState.SAMPLED], counts[PairState.LABELED], counts.labels) == (4, 3, 1, 1)
    (lost,), (replaced,) = records.of("replica lost"), records.of("replica replaced")
    assert lost["role"] == replaced["role"] == "preference store"
    assert "the ledger postgresql+psycopg://pilaf@127.0.0.1" in lost["cause"]


class _FakeGenerator:
    """Serves a version; remembers what it was asked."""

    def __init__(self) -> None:
        self._version = 0

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(memory_mib=1.0)

    def pull(self, version: int) -> None:
        self._version = version

    def generate(self, request: GenerationRequest) -> tuple[str, int]:
        return request.request_id, self._version


async def test_a_new_generator_pulls_the_newest_weights_before_its_first_request() -> None:
    actor_class, records = ray.remote(_FakeGenerator), Records()
    pulling, pulled = asyncio.Event(), []

    async def spawn(_number: int) -> Any:
        return actor_class.options(num_cpus=0).remote()

    async def pull(actor: Any, number: int, version: int) -> None:
        await call(actor.pull.remote(version), role=f"generator-{number}", seconds=30)
        pulled.append(version)
        pulling.set()
        while version == 1 and len(pulled) == 1 and not superseded.is_set():
            await asyncio.sleep(0.01)

    superseded = asyncio.Event()
    pool = GeneratorPool([await spawn(0)], spawn=spawn, call_seconds=30.0, policy=POLICY, report=records)
    pool.follow(pull, 1)
    ray.kill(pool.actors[0])
    request = GenerationRequest(request_id="pair-1-a", prompt_token_ids=(1,), coefficient=0.0, seed=0)
    answer = asyncio.ensure_future(pool.generate(request))
    await pulling.wait()
    pool.follow(pull, 2)
    superseded.set()
    name, version = await asyncio.wait_for(answer, 60)  # type: ignore[misc]
    assert version == 2 and pulled == [1, 2]
    assert name.startswith("pair-1-a.")
    await pool.close()


class _HeldGenerator(_FakeGenerator):
    """Answers while the folder holds no file ``hold``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def generate(self, request: GenerationRequest) -> tuple[str, int]:
        (self._folder / f"asked-{os.getpid()}").touch()
        while (self._folder / "hold").exists():
            time.sleep(0.01)  # polling another process, not ordering work
        return super().generate(request)


async def test_a_pool_grows_with_the_newest_weights_and_shrinks_without_losing_work(tmp_path: Path) -> None:
    actor_class, records, left = ray.remote(_HeldGenerator), Records(), list[int]()

    async def spawn(number: int) -> Any:
        if number == 3:
            raise PlacementError("no room for a fourth")
        return actor_class.options(num_cpus=0).remote(tmp_path)

    async def pull(actor: Any, number: int, version: int) -> None:
        await call(actor.pull.remote(version), role=f"generator-{number}", seconds=30)

    pool = GeneratorPool(
        [await spawn(0)], spawn=spawn, leave=left.append, call_seconds=60.0, policy=PATIENT, report=records
    )
    pool.follow(pull, 7)
    assert await pool.resize(4) == 3, "one finds no room, and the run goes on"
    assert [details["cause"] for details in records.of("generator not added")] == ["no room for a fourth"]
    assert sorted(details["replica"] for details in records.of("replica added")) == [1, 2]
    (tmp_path / "hold").touch()
    requests = [
        GenerationRequest(request_id=f"pair-{n}-a", prompt_token_ids=(1,), coefficient=0.0, seed=0) for n in range(3)
    ]
    answers = [asyncio.ensure_future(pool.generate(request)) for request in requests]
    await until(lambda: len(list(tmp_path.glob("asked-*"))) == 3)
    assert await pool.resize(1) == 1
    assert left == [2, 1] and sorted(pool.actors) == [0]
    removed = [(details["replica"], details["handed_back"]) for details in records.of("replica removed")]
    assert removed == [(2, 1), (1, 1)], "each had one response under way"
    (tmp_path / "hold").unlink()
    served: list[Any] = await asyncio.wait_for(asyncio.gather(*answers), 60)
    assert [name.split(".")[0] for name, _ in served] == ["pair-0-a", "pair-1-a", "pair-2-a"]
    assert not records.of("replica lost"), "nobody is to blame"
    assert await pool.resize(2) == 2
    versions = [await call(actor.generate.remote(requests[0]), role="g", seconds=30) for actor in pool.actors.values()]
    assert [version for _, version in versions] == [0, 7], "the newcomer has pulled; the first never was asked to"
    await pool.close()


@dataclass(frozen=True)
class Ticket:
    version: int
    transport: str


class _Updatable:
    """Takes weights by one transport only; ``serves`` is what its scores say."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._version = 0

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(memory_mib=1.0)

    def update_weights(self, ticket: Ticket, _deadline_seconds: float) -> None:
        if ticket.transport != self._transport:
            raise WeightSyncError(f"no route by {ticket.transport}")
        self._version = ticket.version

    def score(self, _prompt: tuple[int, ...], response: tuple[int, ...]) -> list[float]:
        return [-float(self._version)] * len(response)

    def version(self) -> int:
        return self._version


class FakeLearner:
    """Publishes by gloo, again by folder; its log-probabilities are minus the version."""

    lie = 0.0
    loss: RoleLostError | None = None

    async def unless_lost(self, work: Awaitable[None]) -> None:
        await work

    async def publish(self, version: int) -> Ticket:
        return Ticket(version, "gloo")

    async def publish_again(self, version: int) -> Ticket:
        return Ticket(version, "filesystem")

    async def policy_logprobs(self, items: list[Any]) -> list[list[float]]:
        return [[-3.0 + self.lie] * len(response) for _, response in items]


async def test_weights_go_the_second_way_and_a_generator_that_takes_neither_is_replaced() -> None:
    actor_class, records = ray.remote(_Updatable), Records()
    transports = {0: "gloo", 1: "filesystem", 2: "pigeon"}

    async def spawn(number: int) -> Any:
        transport, transports[number] = transports[number], "filesystem"
        return actor_class.options(num_cpus=0).remote(transport)

    pool = GeneratorPool(
        [await spawn(n) for n in range(3)], spawn=spawn, call_seconds=30, policy=PATIENT, report=records
    )
    learner = FakeLearner()
    roles: Any = SimpleNamespace(turns=None, generators=pool, learner=learner)
    sync = make_weight_sync(roles, probe_items=[((1,), (2, 3))], tolerance=0.01, deadline_seconds=30.0, report=records)
    await sync.serve(3, await sync.push(3))
    await until(lambda: len(pool.actors) == 3)
    versions = [await call(actor.version.remote(), role="g", seconds=30) for actor in pool.actors.values()]
    assert versions == [3, 3, 3]
    second = records.of("weights by the second way")
    assert sorted({details["replica"] for details in second}) == [1, 2]
    assert second[0]["cause"] == "no route by gloo"
    assert [details["replica"] for details in records.of("replica replaced")] == [2]
    learner.lie = 0.5
    with pytest.raises(WeightSyncError, match=r"serves log-probabilities 0\.500 away from the learner's"):
        await sync.serve(3, await sync.push(3))
    await pool.close()


class FakeGenerators:
    """Replica 0 is replaced while it pulls; what is done to its successor is written down."""

    def __init__(self) -> None:
        self.actors: dict[int, str] = {0: "old"}
        self.lost: list[int] = []

    def lose(self, number: int, _error: RoleLostError) -> None:
        self.lost.append(number)


async def test_a_pull_that_ends_after_its_generator_was_replaced_does_not_cost_the_new_one() -> None:
    generators = FakeGenerators()
    roles: Any = SimpleNamespace(generators=generators, learner=FakeLearner())
    updates = GeneratorUpdates(roles, probe_items=[], tolerance=None, deadline_seconds=30.0)
    update = PublishedWeights(ticket=Ticket(3, "gloo"), probe_logprobs=[])
    assert list(updates.pulls()) == [0]
    late = RoleLostError("generator-0 did not answer within 30 s")
    generators.actors = {0: "new"}
    await updates.recover(0, update, late)
    generators.actors = {}
    await updates.recover(0, update, late)
    assert generators.lost == []
    generators.actors = {0: "old"}
    updates.pulls()
    await updates.recover(0, update, late)
    assert generators.lost == [0]


async def test_a_learner_that_dies_in_a_transfer_is_the_one_that_is_lost() -> None:
    generators, learner = FakeGenerators(), FakeLearner()

    async def dead(version: int) -> Ticket:
        raise RoleLostError("policy learner rank 0 has died")

    learner.publish_again = dead  # type: ignore[method-assign]
    roles: Any = SimpleNamespace(generators=generators, learner=learner)
    updates = GeneratorUpdates(roles, probe_items=[], tolerance=None, deadline_seconds=30.0)
    updates.pulls()
    update = PublishedWeights(ticket=Ticket(3, "gloo"), probe_logprobs=[])
    with pytest.raises(RoleLostError, match="policy learner rank 0 has died"):
        await updates.recover(0, update, WeightSyncError("connection closed by peer"))
    learner.loss = RoleLostError("policy learner rank 0 gave no sign of life")
    with pytest.raises(RoleLostError, match="no sign of life"):
        await updates.recover(0, update, learner.loss)
    assert generators.lost == []


async def test_a_newcomer_outlives_the_learner_whose_weights_it_was_pulling() -> None:
    pulled: list[object] = []

    async def spawn(number: int) -> str:
        return f"generator {number}"

    async def works(_actor: object, _number: int, update: object) -> None:
        pulled.append(update)

    async def superseded(_actor: object, _number: int, _update: object) -> None:
        pool.follow(works, "of the new learner")
        raise WeightSyncError("did not arrive: connection refused")

    async def forgotten(_actor: object, _number: int, _update: object) -> None:
        pool.forget_weights()
        raise RoleLostError("policy learner rank 0 has died")

    pool = GeneratorPool([], spawn=spawn, call_seconds=30, policy=PATIENT)
    pool.follow(superseded, "of the lost learner")
    assert await pool._newcomer(3) == "generator 3"
    assert pulled == ["of the new learner"]
    pool.follow(forgotten, "of the lost learner")
    assert await pool._newcomer(4) == "generator 4"
    assert pulled == ["of the new learner"], "the rebuilt learner will be pulled from later"
    await pool.close()


async def test_a_newcomer_asks_for_no_second_copy_of_a_version_that_was_superseded_meanwhile() -> None:
    async def spawn(number: int) -> str:
        return f"generator {number}"

    pool = GeneratorPool([], spawn=spawn, call_seconds=30, policy=PATIENT)
    learner, asked, again = FakeLearner(), list[int](), list[int]()

    async def copy(version: int) -> Ticket:
        again.append(version)
        return Ticket(version, "filesystem")

    learner.publish_again = copy  # type: ignore[method-assign]
    roles: Any = SimpleNamespace(generators=pool, learner=learner)
    updates = GeneratorUpdates(roles, probe_items=[], tolerance=None, deadline_seconds=30.0)

    async def pull(_actor: object, _number: int, update: PublishedWeights) -> None:
        asked.append(update.ticket.version)
        if update.ticket.version == 3:
            updates.announce(PublishedWeights(ticket=Ticket(4, "gloo"), probe_logprobs=[]))
        if update.ticket.transport == "gloo":
            raise WeightSyncError("nobody serves it there any more")

    updates._pull = pull  # type: ignore[method-assign]
    updates.announce(PublishedWeights(ticket=Ticket(3, "gloo"), probe_logprobs=[]))
    assert await pool._newcomer(0) == "generator 0"
    assert asked == [3, 4, 4]
    assert again == [4], "the newest comes by the second way where the first fails"
    await pool.close()


class FakeEngine:
    """Takes weights when it is let."""

    def __init__(self) -> None:
        self.may_load = asyncio.Event()
        self.loaded: list[int] = []

    async def update_weights(self, ticket: Ticket, *, deadline_seconds: float) -> None:
        await self.may_load.wait()
        self.loaded.append(ticket.version)

    async def heartbeat(self) -> None:
        raise AssertionError("an engine that takes weights answers nothing")

    async def alive(self) -> None:
        """Its process runs."""


async def test_an_update_that_nobody_waits_for_any_more_comes_to_its_end() -> None:
    generator, engine = object.__new__(_Generator), FakeEngine()
    generator._generator, generator._processes, generator._updates = engine, engine, 0  # type: ignore[assignment]
    asked = asyncio.ensure_future(generator.update_weights(Ticket(4, "gloo"), 30.0))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert (await generator.heartbeat()).memory_mib > 0, "the process is looked at, not the engine"
    engine.may_load.set()
    while generator._updates:
        await asyncio.sleep(0)
    assert engine.loaded == [4]


class _Rank:
    """A rank whose collective fails when its peer is gone."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(memory_mib=1.0)

    def pid(self) -> int:
        return os.getpid()

    def step(self, peer: int) -> int:
        if self._rank == 1:
            os._exit(1)
        while Path(f"/proc/{peer}").exists():
            pass
        raise RuntimeError("connection closed by peer")

    def echo(self, value: int) -> int:
        return value + self._rank


async def test_a_learner_group_names_the_rank_that_died_first_and_is_rebuilt() -> None:
    actor_class = ray.remote(_Rank)

    async def start() -> list[Any]:
        return [actor_class.options(num_cpus=0).remote(rank) for rank in range(2)]

    group = LearnerGroup(await start(), start=start, call_seconds=30.0, policy=PATIENT)
    assert await group.everywhere("echo", 5) == [5, 6]
    peer = (await group.everywhere("pid"))[1]
    with pytest.raises(RoleDiedError, match="policy learner rank 1 has died"):
        await group.everywhere("step", peer)
    await until(lambda: group.loss is not None)
    with pytest.raises(RoleLostError, match="rank 1 has died"):
        await group.everywhere("echo", 5)
    await group.rebuild()
    assert await group.everywhere("echo", 7) == [7, 8]
    await group.close()
