"""How fast the console is over a large ledger: ``python -m benchmarks.console --pairs 1000000``.

Makes a synthetic run, serves it in a process of its own, and reads every page from many clients at once.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from sqlalchemy import Table

from benchmarks.machine import machine
from pilaf_ray.store import codec
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.store.tables import labels, pairs, plans, responses
from pilaf_ray.types import FinishReason, PairPlan, Prompt, SampledResponse, VersionSpan

Row = dict[str, object]

PORT = 8399
BATCH = 64
PATHS = (
    "/",
    "/numbers",
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
    """Seconds of each request; every client reads all pages in an order of its own, and then waits a little."""
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}

    async def client(number: int, http: httpx.AsyncClient) -> None:
        draw = random.Random(number)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pause", type=float, default=5.0, help="mean seconds that a viewer looks at a page")
    parser.add_argument("--folder", help="keep the synthetic run there, or use the one that is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(given.folder or scratch) / "large"
        if not path.exists():
            started = time.monotonic()
            fill(path, given.pairs)
            print(f"{given.pairs} pairs written in {time.monotonic() - started:.0f} s")
        process = multiprocessing.get_context("spawn").Process(target=run_server, args=(str(path),), daemon=True)
        process.start()
        for _ in range(200):
            try:
                httpx.get(f"http://127.0.0.1:{PORT}/", timeout=30)
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        seconds = asyncio.run(measure(given.pairs, given.clients, given.rounds, given.pause))
        process.terminate()
    print(machine())
    print(f"{given.pairs} pairs, {given.clients} viewers, {given.pause:g} s a page; milliseconds")
    for path, values in seconds.items():
        ordered = sorted(values)
        median, p95 = (1000 * ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.95))
        print(f"{path:40} median {median:6.0f}   p95 {p95:6.0f}   n {len(values)}")


if __name__ == "__main__":
    main()
