"""People behind real actors: the desk in the store, a console that may be killed, gauges for Prometheus."""

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from console_run import CONFIG, make_run
from pairs import pair, plan

from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.launch import RoleLauncher
from pilaf_ray.actors.people import DeskHandle, start_console
from pilaf_ray.actors.prometheus import PrometheusSink
from pilaf_ray.console.access import AccessBook, AccessRole, form_token
from pilaf_ray.errors import ConfigError
from pilaf_ray.observability.exposed import PREFIX, exposed_names
from pilaf_ray.observability.metric_table import METRICS
from pilaf_ray.oracle.human import HumanOracle, HumanRules
from pilaf_ray.types import PairState


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(address=None, num_cpus=2):
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def answered(client: httpx.AsyncClient, path: str) -> httpx.Response:
    """A page, once the server is (again) there."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await client.get(path)
            except httpx.TransportError:
                await asyncio.sleep(0.1)


async def test_answers_reach_the_run_and_outlive_the_console_and_the_store(tmp_path: Path) -> None:
    run, waiting = make_run(tmp_path / "run", pairs=6), (6, 7, 8)
    (run / "config.json").write_text(json.dumps({**CONFIG, "oracle": {"type": "human"}}))
    store = await RoleLauncher(logs=str(tmp_path / "logs"), call_seconds=60).store(f"sqlite:///{run}/preferences.db")
    await store.add_plans([plan(number) for number in waiting])
    await store.add_responses([pair(number) for number in waiting])
    await store.open_desk(600.0, run / "inbox")
    desk, port = DeskHandle(store.desk), free_port()
    settings = {"logs": tmp_path / "logs", "run": run, "host": "127.0.0.1", "port": port, "allowed_hosts": ()}
    console = await start_console(**settings, store=store.name, call_seconds=60)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be bound"):
        await start_console(**settings, store=None, call_seconds=60)  # type: ignore[arg-type]
    secret = AccessBook(run / "access.json").issue("ada", AccessRole.ANNOTATOR)
    labels = asyncio.create_task(
        HumanOracle(desk, HumanRules(undo_seconds=0.1)).label([pair(number) for number in waiting])
    )
    headers = {"cookie": f"pilaf_token={secret}", "x-form-token": form_token(secret)}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
        for number in range(3):
            fields: dict[str, str] = {}
            async with asyncio.timeout(60):
                while not fields:
                    page = (await answered(client, "/label")).text
                    fields = dict(re.findall(r'name="(number|pair)" value="([^"]*)"', page))
            saved = await client.post("/label/answer", data={**fields, "choice": "equal"})
            assert saved.status_code == 200 and "Saved." in saved.text
            if number == 0:
                os.kill(ray.get(console.process_id.remote()), signal.SIGKILL)
            elif number == 1:
                # The console finds the writer that replaces this one by its name.
                ray.kill(ray.get_actor(store.name))
    found = await asyncio.wait_for(labels, 60)
    assert [(label.pair_id, label.probability, label.source) for label in found] == [
        (f"pair-{number}", 0.5, "human") for number in waiting
    ]
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "console restarted"
    async with asyncio.timeout(60):
        while (pulse := store.replicas[0].pulse) is None:
            await asyncio.sleep(0.1)
    assert store.replicas[0].serving and 20.0 < pulse.memory_mib < 2000.0
    assert len(await desk.history()) == 3 and (await store.counts())[PairState.SAMPLED] == len(waiting)


async def test_every_name_of_the_dashboard_is_exposed(tmp_path: Path) -> None:
    sink = PrometheusSink("run-a", tmp_path)
    sink.write({"step": 3, **{d.key: 0.25 for d in METRICS}})
    sink.write_roles({"generator": (2, 0.5)})
    sink.write_counts({PairState.TRAINED: 7})
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    wanted = {PREFIX + name for name in exposed_names()}
    exposed: dict[str, str] = {}
    async with httpx.AsyncClient(timeout=10) as client, asyncio.timeout(60):
        while not wanted <= set(exposed):
            await asyncio.sleep(0.5)
            lines = (await answered(client, address)).text.splitlines()
            exposed = {line.split("{")[0]: line for line in lines if line.startswith(f"{PREFIX}pilaf")}
    assert 'run="run-a"' in exposed["ray_pilaf_loss"] and exposed["ray_pilaf_loss"].endswith(" 0.25")
    assert 'state="trained"' in exposed["ray_pilaf_pairs"] and exposed["ray_pilaf_pairs"].endswith((" 7", " 7.0"))
