"""A real Prometheus scrapes what a run exposes and answers every query of the dashboard."""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.prometheus import TARGETS, PrometheusSink
from pilaf_ray.observability.exposed import PREFIX, STEP, exposed_name
from pilaf_ray.observability.metric_table import METRICS
from pilaf_ray.types import PairState

PROMETHEUS = shutil.which("prometheus")
LAUNCH = Path(__file__).parents[2] / "launch"
VALUES = {d.key: 0.5 + number / 8 for number, d in enumerate(METRICS)}
"""What each key is set to: different, and exact in binary."""

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus: install Debian's prometheus")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(address=None, num_cpus=2):
        yield


@asynccontextmanager
async def prometheus(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Prometheus with the shipped configuration, as a checkout in ``folder`` holds it, every second instead of ten."""
    written = (LAUNCH / "prometheus.yml").read_text()
    assert written.count("10s") == 2
    config = folder / "launch" / "prometheus.yml"
    config.parent.mkdir()
    config.write_text(written.replace("10s", "1s"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"config.file": config, "storage.tsdb.path": folder / "data", "web.listen-address": address}
    command = [str(PROMETHEUS), *(f"--{name}={value}" for name, value in flags.items())]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=10) as client, asyncio.timeout(120):
            while not await is_ready(client):
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                await asyncio.sleep(0.1)  # polling another process, not ordering work
            yield client
    finally:
        process.terminate()
        process.wait()


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def ask(client: httpx.AsyncClient, path: str, **parameters: str) -> Any:
    """The data of an answer that holds neither an error nor a warning."""
    body = (await client.get(f"/api/v1/{path}", params=parameters)).raise_for_status().json()
    assert body["status"] == "success" and not body.get("warnings"), body
    return body["data"]


async def answered(client: httpx.AsyncClient, query: str, *, series: int) -> list[dict[str, Any]]:
    """The series of a query, once there are so many: what a run sets at once may come in two scrapes."""
    while True:
        found = (await ask(client, "query", query=query))["result"]
        if len(found) >= series:
            return list(found)
        await asyncio.sleep(0.2)  # polling another process, not ordering work


def exposed_run(folder: Path, name: str, *, step: int) -> PrometheusSink:
    sink = PrometheusSink(name, folder / "runs")
    sink.write({"step": step, **VALUES})
    sink.write_roles({"generator": (2, 0.5), "learner": (1, 0.25)})
    sink.write_counts({PairState.TRAINED: 7, PairState.SAMPLED: 3})
    return sink


async def test_every_query_of_the_dashboard_is_answered_by_a_real_prometheus(tmp_path: Path) -> None:
    board = json.loads((LAUNCH / "grafana" / "dashboards" / "pilaf.json").read_text())
    async with prometheus(tmp_path) as client:
        (tmp_path / "runs").mkdir()
        # Runs that begin after Prometheus has.
        sinks = [exposed_run(tmp_path, "run-a", step=3), exposed_run(tmp_path, "run-b", step=9)]
        (variable,) = [v for v in board["templating"]["list"] if v["name"] == "run"]
        assert variable["query"]["query"] == f"label_values({PREFIX}{STEP}, run)"
        await answered(client, f"{PREFIX}{STEP}", series=2)
        # What label_values asks, and what Grafana puts in the place of $run when both are chosen.
        runs = await ask(client, "label/run/values", **{"match[]": f"{PREFIX}{STEP}"})
        assert runs == ["run-a", "run-b"]
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for panel in board["panels"]:
            (target,) = panel["targets"]
            each_run = 1 if panel["title"] in (*VALUES, "Step") else 2
            series = await answered(client, target["expr"].replace("$run", "(run-a|run-b)"), series=2 * each_run)
            found[panel["title"]] = {
                tuple(v for _, v in sorted(s["metric"].items())): float(s["value"][1]) for s in series
            }
        for key, value in VALUES.items():
            assert found.pop(key) == {("run-a",): value, ("run-b",): value}, key
        two = ("run-a", "run-b")
        assert found == {
            "Step": {("run-a",): 3.0, ("run-b",): 9.0},
            "Pairs by state": {(r, s): n for r in two for s, n in (("trained", 7.0), ("sampled", 3.0))},
            "Busy share of each role": {(g, r): n for r in two for g, n in (("generator", 0.5), ("learner", 0.25))},
            "Calls under way": {(g, r): n for r in two for g, n in (("generator", 2.0), ("learner", 1.0))},
        }
        (help_text,) = (await ask(client, "metadata", metric=f"{PREFIX}{exposed_name('time/wait')}")).values()
        assert help_text[0]["type"] == "gauge" and "time/wait in s" in help_text[0]["help"]
        (target,) = (await ask(client, "targets"))["activeTargets"]
        assert target["health"] == "up", "both runs are served by one agent"
        for sink in sinks:
            sink.close()
            sink.close()
        assert not list(tmp_path.glob(f"runs/{TARGETS}/*"))
        while (await ask(client, "targets"))["activeTargets"]:
            await asyncio.sleep(0.2)  # polling another process, not ordering work
