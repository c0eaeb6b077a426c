"""How fast the console is over a large ledger: ``python -m benchmarks.console --pairs 1000000``.

Makes a synthetic run, serves it in a process of its own, and reads every page from many clients at once. Then it keeps
every core busy, lets as many viewers watch the overview of a run that goes on, and says what that takes from the work.
"""

import asyncio
import hashlib
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from sqlalchemy import Table

from benchmarks.machine import machine
from pilaf_ray.observability.sinks import EventLog, JsonlSink
from pilaf_ray.store import codec
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.tables import labels, pairs, plans, responses
from pilaf_ray.types import FinishReason, PairPlan, Prompt, SampledResponse, VersionSpan

Row = dict[str, object]

PORT = 8399
STEP_SECONDS = 12.0
"""Between two steps of the synthetic run: about the demo's on two cores. What viewers cost, they cost a step."""
BATCH = 64
PATHS = (
    "/",
    "/roles",
    "/samples",
    "/pairs",
    "/pairs?before={middle}",
    "/pairs?state=trained",
    "/pairs?state=abstained",
    "/pairs?branch=interpolated&age=1",
    "/pairs?text=topic+77",
    "/pairs?tie=1",
    "/pairs/{pair}",
)


def fill(path: Path, count: int) -> None:
    """A run folder with ``count`` pairs, most of them trained."""
    path.mkdir(parents=True)
    config = {
        "run": {"name": "large", "max_steps": count // BATCH + 1},
        "model": {"policy": "nowhere"},
        "algorithm": {"beta": 0.1},
        "learner": {"batch_pairs": BATCH},
        "pipeline": {"max_staleness_steps": 1},
        "oracle": {"type": "function"},
    }
    (path / "config.json").write_text(json.dumps(config))
    ledger = PreferenceLedger(f"sqlite:///{path / 'preferences.db'}")
    draw = random.Random(0)
    texts = [response(version, draw) for version in range(200)]
    for start in range(0, count, 20_000):
        rows: dict[Table, list[Row]] = {table: [] for table in (pairs, plans, responses, labels)}
        for index in range(start, min(start + 20_000, count)):
            for table, row in pair_rows(index, texts, draw).items():
                rows[table].append(row)
        with ledger.database.writing() as connection:
            for table, new in rows.items():
                connection.execute(table.insert(), new)
    ledger.close()
    with (path / "metrics.jsonl").open("w") as stream:
        for step in range(1, count // BATCH + 1):
            row = {"step": step, "loss": 0.6, "age/max": 1, "time/wait": 0.1, "time/train": 0.2, "time/push": 0.1}
            stream.write(json.dumps(row) + "\n")


def response(version: int, draw: random.Random) -> bytes:
    """An answer of 64 tokens as the ledger keeps it."""
    return codec.encode(
        SampledResponse(
            token_ids=tuple(range(64)),
            text=" ".join(f"word{draw.randrange(500)}" for _ in range(48)),
            coefficient=0.0,
            logprobs=(-1.5,) * 64,
            versions=(VersionSpan(version=version, start=0, end=64),),
            finish_reason=FinishReason.STOP,
        )
    )


def pair_rows(index: int, texts: Sequence[bytes], draw: random.Random) -> dict[Table, Row]:
    """What the ledger's tables say of one pair."""
    step, topic = index // BATCH + 1, index % 3000
    plan = PairPlan(
        pair_id=f"{index:032x}",
        index=index,
        prompt=Prompt(prompt_id=f"p-{topic}", text=f"Write about topic {topic}", token_ids=(1, 2, 3)),
        branch=("on_policy", "interpolated")[index % 2],
        coefficient_a=0.0,
        coefficient_b=0.0,
        seed_a=index,
        seed_b=index,
        present_b_first=False,
        label_seed=index,
    )
    moments = dict.fromkeys(("planned_at", "sampled_at", "labeled_at", "trained_at"), index)
    return {
        plans: {"plan_index": index, "prompt": plan.prompt.text, "plan": codec.encode(plan)},
        responses: {
            "plan_index": index,
            "response_a": texts[index % 200],
            "response_b": texts[(index + 7) % 200],
            "draw": None,
        },
        labels: {
            **dict.fromkeys(("annotator", "reason", "withdraws", "details")),
            "sequence": index + 1,
            "key": plan.pair_id,
            "plan_index": index,
            "sampling": 0,
            "kind": "verdict",
            "source": "function",
            "probability": draw.choice((0.0, 1.0, 0.9)),
            "reward_a": 0.1,
            "reward_b": 0.2,
            "late": False,
            "created_at": index,
        },
        pairs: {
            "plan_index": index,
            "pair_id": plan.pair_id,
            "state": "abstained" if index % 9973 == 0 else "trained",
            "branch": plan.branch,
            "sampling": 0,
            "min_version": max(0, step - 1 - index % 2),
            "max_version": step - 1,
            "label_sequence": index + 1,
            "reference_a": -1.0,
            "reference_b": -1.0,
            "trained_step": step,
            **moments,
        },
    }


def run_server(path: str) -> None:
    from pilaf_ray.console.app import create_app
    from pilaf_ray.console.guard import RateLimit
    from pilaf_ray.console.serving import serve

    serve(create_app(Path(path), limit=RateLimit(per_second=1e6, burst=10**6)), host="127.0.0.1", port=PORT)


async def measure(count: int, clients: int, rounds: int, pause: float) -> dict[str, list[float]]:
    """Seconds of each request; every client comes at a moment and reads all pages in an order of its own."""
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}

    async def client(number: int, http: httpx.AsyncClient) -> None:
        draw = random.Random(number)
        await asyncio.sleep(draw.uniform(0, 2 * pause))
        for _ in range(rounds):
            for path in draw.sample(PATHS, len(PATHS)):
                address = path.format(middle=draw.randrange(1, count), pair=f"{draw.randrange(count):032x}")
                started = time.monotonic()
                answer = await http.get(address)
                seconds[path].append(time.monotonic() - started)
                assert answer.status_code == 200, (address, answer.status_code)
                await asyncio.sleep(draw.uniform(0, 2 * pause))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=60, limits=limits) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    return seconds


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time on a machine whose cores are all at work."""

    work: float
    """Units of work a second, all cores together."""
    console: float
    """CPU seconds a second that the console's process took."""
    viewers: float
    """The same of the process that plays the viewers."""


def burn(done: "Synchronized[int]") -> None:
    """Work for one core for ever, at the niceness of Ray's workers."""
    os.nice(15)
    block = bytes(1 << 16)
    while True:
        for _ in range(100):
            hashlib.sha256(block).digest()
        done.value += 1


def watch(clients: int) -> None:
    """``clients`` open overviews: the page, and the live stream that it then listens to."""

    async def viewer(http: httpx.AsyncClient) -> None:
        await http.get("/")
        async with http.stream("GET", "/live") as stream:
            async for _ in stream.aiter_bytes():
                pass

    async def everyone() -> None:
        limits = httpx.Limits(max_connections=2 * clients)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=None, limits=limits) as http:
            await asyncio.gather(*(viewer(http) for _ in range(clients)))

    asyncio.run(everyone())


def beside(server: psutil.Process, path: Path, *, clients: int, seconds: float, rounds: int) -> list[list[Window]]:
    """[without viewers, with viewers] in turn, while every core works and the run writes a step each few seconds."""
    context = multiprocessing.get_context("spawn")
    counters = [context.Value("q", 0) for _ in os.sched_getaffinity(0)]
    burners = [context.Process(target=burn, args=(counter,), daemon=True) for counter in counters]
    for burner in burners:
        burner.start()
    step = int(json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    events, metrics = EventLog(path / "events.jsonl"), JsonlSink(path / "metrics.jsonl")

    def window(watchers: psutil.Process | None) -> Window:
        nonlocal step
        processes = [process for process in (server, watchers) if process]
        before = sum(c.value for c in counters), [sum(p.cpu_times()[:2]) for p in processes]
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            time.sleep(STEP_SECONDS)
            step += 1
            metrics.write({"step": step, "loss": 0.6, "age/max": 1, "time/train": STEP_SECONDS})
            events.record("weights", version=step)
        took = time.monotonic() - started
        used = [(sum(p.cpu_times()[:2]) - was) / took for p, was in zip(processes, before[1], strict=True)]
        return Window((sum(c.value for c in counters) - before[0]) / took, used[0], used[1] if watchers else 0.0)

    found: list[list[Window]] = []
    time.sleep(STEP_SECONDS)
    for _ in range(rounds):
        alone = window(None)
        viewers = context.Process(target=watch, args=(clients,), daemon=True)
        viewers.start()
        time.sleep(2 * STEP_SECONDS)
        found.append([alone, window(psutil.Process(viewers.pid))])
        viewers.terminate()
        viewers.join()
    for burner in burners:
        burner.terminate()
    return found


def tell_beside(found: Sequence[Sequence[Window]], clients: int) -> None:
    """What the viewers took from the work, and how much of that was the console's."""
    cores = len(os.sched_getaffinity(0))
    for alone, watched in found:
        print(
            f"work {watched.work / alone.work:.4f} of what it is without viewers; of {cores} cores the console took "
            f"{watched.console / cores:.2%} ({alone.console / cores:.2%} without viewers), "
            f"the {clients} viewers themselves {watched.viewers / cores:.2%}"
        )


def tell_pages(seconds: Mapping[str, Sequence[float]]) -> None:
    """Median and 95th percentile of each page."""
    for path, values in seconds.items():
        ordered = sorted(values)
        median, p95 = (1000 * ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.95))
        print(f"{path:40} median {median:6.0f}   p95 {p95:6.0f}   n {len(values)}")


def main(
    pairs: Annotated[int, typer.Option(help="In the synthetic ledger.")] = 1_000_000,
    clients: Annotated[int, typer.Option(help="Viewers at once.")] = 50,
    rounds: Annotated[int, typer.Option(help="How often each viewer reads every page.")] = 2,
    pause: Annotated[float, typer.Option(help="Mean seconds that a viewer looks at a page.")] = 5.0,
    folder: Annotated[Path | None, typer.Option(help="Keep the synthetic run there, or use the one there.")] = None,
    beside_seconds: Annotated[float, typer.Option(help="Of each window beside busy cores; 0 leaves them out.")] = 24.0,
) -> None:
    """Measure every page, and what viewers take from a machine whose cores are all at work."""
    with tempfile.TemporaryDirectory() as scratch:
        path = (folder or Path(scratch)) / "large"
        if not path.exists():
            started = time.monotonic()
            fill(path, pairs)
            print(f"{pairs} pairs written in {time.monotonic() - started:.0f} s")
        process = multiprocessing.get_context("spawn").Process(target=run_server, args=(str(path),), daemon=True)
        process.start()
        for _ in range(200):
            try:
                httpx.get(f"http://127.0.0.1:{PORT}/", timeout=30)
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        print(machine())
        print(f"{pairs} pairs, {clients} viewers, {pause:g} s a page; milliseconds")
        tell_pages(asyncio.run(measure(pairs, clients, rounds, pause)))
        if beside_seconds:
            server = psutil.Process(process.pid)
            tell_beside(beside(server, path, clients=clients, seconds=beside_seconds, rounds=3), clients)
        process.terminate()


if __name__ == "__main__":
    typer.run(main)
