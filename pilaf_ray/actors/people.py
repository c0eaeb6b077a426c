"""People as an oracle: the labelling desk in front of the store's actor, and the console in an actor of its own.

The console holds nothing that is worth keeping: when it dies, Ray starts it again, the browsers send what was
not acknowledged, and the run goes on meanwhile.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from pilaf_ray.actors.calls import call
from pilaf_ray.actors.handles import OraclePool
from pilaf_ray.actors.placement import this_node
from pilaf_ray.console.address import require_free_port
from pilaf_ray.errors import ConfigError, RoleLostError
from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.observability.logs import setup_logging
from pilaf_ray.observability.run_status import ReplicaStatus
from pilaf_ray.observability.sinks import EventLog
from pilaf_ray.oracle.mixture import LabelSource
from pilaf_ray.store.desk import Backlog, Opinions, Progress
from pilaf_ray.store.records import LabelEvent, Lease
from pilaf_ray.types import PreferenceLabel, ResponsePair, RoleUsage

START_SECONDS = 120.0


class AskDesk(Protocol):
    """How the desk is reached: a method of it, and its arguments."""

    async def __call__(self, method: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any: ...


def desk_of(store: str, *, call_seconds: float) -> AskDesk:
    """The desk of the store's actor that has this name now, for whoever does not supervise it.

    A writer that replaces a lost one takes over its name; in between, RoleLostError.
    """

    async def ask(method: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        try:
            actor = ray.get_actor(store)
        except ValueError as error:
            raise RoleLostError("preference store is being replaced") from error
        remote = actor.desk.remote(method, arguments, named)
        return await call(remote, role="preference store", seconds=call_seconds)

    return ask


class DeskHandle:
    """The desk, in the process of the ledger's single writer."""

    def __init__(self, ask: AskDesk) -> None:
        self._call = ask

    async def want(self, pair_ids: Sequence[str], votes_per_pair: int) -> Mapping[str, Opinions]:
        return await self._ask("want", list(pair_ids), votes_per_pair)

    async def take(self, annotator: str) -> Lease | None:
        return await self._ask("take", annotator)

    async def renew(self, lease_id: int, annotator: str) -> Lease:
        return await self._ask("renew", lease_id, annotator)

    async def answer(
        self, lease_id: int, pair_id: str, annotator: str, *, probability: float | None, details: str,
        reason: str | None, skip: bool,
    ) -> LabelEvent:  # fmt: skip
        named = {"probability": probability, "details": details, "reason": reason, "skip": skip}
        return await self._ask("answer", lease_id, pair_id, annotator, **named)

    async def undo(self, annotator: str) -> LabelEvent | None:
        return await self._ask("undo", annotator)

    async def requeue(self, annotator: str) -> int:
        return await self._ask("requeue", annotator)

    async def history(self) -> list[LabelEvent]:
        return await self._ask("history")

    async def progress(self, annotator: str) -> Progress:
        return await self._ask("progress", annotator)

    async def spent(self) -> dict[str, int]:
        """Labels that pairs carry, by source."""
        return await self._ask("spent")

    async def backlog(self) -> Backlog:
        return await self._ask("backlog")

    async def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        return await self._call(method, arguments, named)


class PeoplePool:
    """What labels pairs, behind the oracle's port, and beside it what scores single responses.

    No deadline of a call applies to people: each question to the desk is a call of its own.

    Args:
        labels: people, a judge, or a mixture.
    """

    def __init__(self, labels: LabelSource, scorer: OraclePool) -> None:
        self._labels = labels
        self._scorer = scorer
        self.meter = BusyMeter()

    async def label(self, pairs: Sequence[ResponsePair]) -> list[PreferenceLabel]:
        """One label a pair, whenever it comes."""
        with self.meter.call():
            return await self._labels.label(pairs)

    async def score_texts(self, prompts: list[str], responses: list[str], *, pairs: Sequence[str] = ()) -> list[float]:
        """Rewards of single responses, by what scores."""
        return await self._scorer.score_texts(prompts, responses, pairs=pairs)

    async def close(self) -> None:
        """Stop watching what scores."""
        await self._scorer.close()

    @property
    def replicas(self) -> list[ReplicaStatus]:
        """Of what scores."""
        return self._scorer.replicas

    async def usage(self) -> list[RoleUsage]:
        """Of what scores; people are not measured."""
        return await self._scorer.usage()


class _Console:
    """The console's server, in a thread of its actor; started by ``__init__``, so also when Ray restarts it."""

    def __init__(
        self,
        logs: str,
        run: str,
        host: str,
        port: int,
        allowed_hosts: Sequence[str],
        store: str | None,
        call_seconds: float,
    ) -> None:
        setup_logging("console", Path(logs))
        from pilaf_ray.console.app import create_app
        from pilaf_ray.console.serving import server

        if ray.get_runtime_context().was_current_actor_reconstructed:
            EventLog(Path(run) / "events.jsonl").record("console restarted")
        desk = None if store is None else DeskHandle(desk_of(store, call_seconds=call_seconds))
        app = create_app(Path(run), host=host, allowed_hosts=allowed_hosts, desk=desk)
        self._server = server(app, host=host, port=port)
        threading.Thread(target=self._server.run, name="console", daemon=True).start()

    def process_id(self) -> int:
        """For those who want to end it."""
        return os.getpid()

    def start(self) -> bool:
        """Answers once the server does; False where it could not bind."""
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started and not self._server.should_exit and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._server.started


ConsoleActor = ray.remote(_Console)


async def start_console(
    *, logs: Path, run: Path, host: str, port: int, allowed_hosts: Sequence[str], store: str | None, call_seconds: float
) -> ActorHandle:
    """Serve the console of ``run`` from an actor on this machine, for as long as somebody holds what is returned.

    Args:
        store: the name of the store's actor where people label; None without a labelling page.

    Raises:
        ConfigError: the address is taken.
    """
    require_free_port(host, port)
    # It reads the run folder and the ledger's file, so it stays on the machine that writes them.
    actor = ConsoleActor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=this_node()).remote(
        str(logs.resolve()), str(run.resolve()), host, port, tuple(allowed_hosts), store, call_seconds
    )
    if not await call(actor.start.remote(), role="console", seconds=START_SECONDS):
        raise ConfigError(f"console.port: nothing could be served at {host}:{port}; see the console's log")
    return actor
