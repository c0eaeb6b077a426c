"""What the ledger takes: `python -m benchmarks.ledger [--url URL] [--pairs 4096] [--batch 8 --batch 128]`.

One writer, pairs of realistic size through plan → sampled → labeled → trained, each arrow one durable
transaction a batch. Beside the times of the arrows: reading the counts, and reading what is unfinished
while a few pairs are and all others are not. Prints a table, and JSON on the last line.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.types import (
    FinishReason,
    PairPlan,
    PreferenceLabel,
    Prompt,
    ReferenceLogprobs,
    ResponsePair,
    SampledResponse,
    VersionSpan,
)

T = TypeVar("T")

ARROWS = ("plan", "sampled", "labeled", "trained")


def make_pair(index: int, *, tokens: int, draw: random.Random) -> ResponsePair:
    """A mixed pair with log-probabilities of three distributions for each token."""

    def response(coefficient: float) -> SampledResponse:
        logprobs = [tuple(-draw.expovariate(1.0) for _ in range(tokens)) for _ in range(3)]
        return SampledResponse(
            token_ids=tuple(draw.randrange(49_152) for _ in range(tokens)),
            text=" ".join(f"word{draw.randrange(500)}" for _ in range(3 * tokens // 4)),
            coefficient=coefficient,
            logprobs=logprobs[0],
            versions=(VersionSpan(version=index // 16, start=0, end=tokens),),
            finish_reason=FinishReason.LENGTH,
            policy_logprobs=logprobs[1],
            reference_logprobs=logprobs[2],
        )

    plan = PairPlan(
        pair_id=f"{draw.getrandbits(128):032x}",
        index=index,
        prompt=Prompt(
            prompt_id=f"{index:016x}",
            text=f"Write a short review of film number {index}.",
            token_ids=tuple(draw.randrange(49_152) for _ in range(40)),
        ),
        branch="interpolated",
        coefficient_a=0.1,
        coefficient_b=-0.1,
        seed_a=draw.getrandbits(62),
        seed_b=draw.getrandbits(62),
        present_b_first=bool(index % 2),
        label_seed=draw.getrandbits(62),
    )
    return ResponsePair(plan=plan, a=response(0.1), b=response(-0.1))


def measure(url: str, pairs: Sequence[ResponsePair], *, batch: int) -> dict[str, float]:
    """Seconds by arrow, of this process's CPU for all four, and of the reads afterwards."""
    ledger = PreferenceLedger(url, namespace=f"benchmark_{os.getpid()}_{batch}")
    seconds = dict.fromkeys(ARROWS, 0.0)

    def timed(arrow: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        seconds[arrow] = seconds.get(arrow, 0.0) + time.perf_counter() - started
        return result

    used = time.process_time()
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        names = [pair.plan.pair_id for pair in part]
        labels = [PreferenceLabel(pair_id=n, probability=1.0, source="f", reward_a=0.3, reward_b=0.1) for n in names]
        references = [ReferenceLogprobs(pair_id=name, a=-80.5, b=-90.25) for name in names]
        timed("plan", lambda part=part: ledger.add_plans([pair.plan for pair in part]))
        timed("sampled", lambda part=part: ledger.add_responses(part))
        timed("labeled", lambda given=labels, scored=references: ledger.add_labels(given, scored))
        if start + batch < len(pairs):
            timed("trained", lambda step=start // batch + 1, names=names: ledger.mark_trained(step, names))
    seconds["cpu"] = time.process_time() - used
    counts = timed("counts", lambda: ledger.counts().check())
    left = timed("unfinished", ledger.unfinished)[2]
    assert [item.pair for item in left] == list(pairs[-len(left) :]), "what was written is not what is read"
    assert counts.labels == len(pairs)
    ledger.close()
    return seconds


def main(
    url: Annotated[str, typer.Option(help="SQLAlchemy URL; a SQLite file in FOLDER when left out.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Where the SQLite file is made.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of a measurement.")] = 4096,
    tokens: Annotated[int, typer.Option(help="Tokens of a response.")] = 64,
    batch: Annotated[list[int] | None, typer.Option(help="Pairs of a transaction; may be repeated.")] = None,
) -> None:
    """Measure and print."""
    draw = random.Random(0)
    made = [make_pair(index, tokens=tokens, draw=draw) for index in range(pairs)]
    results = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for size in batch or [8, 128]:
            target = url or f"sqlite:///{scratch}/ledger-{size}.db"
            results[size] = measure(target, made, batch=size)
    table = Table(title=f"pairs/s of one writer, {tokens} tokens a side with three log-probabilities each")
    for name in ("pairs a transaction", *ARROWS, "all four", "per CPU s", "counts, ms", "unfinished, ms"):
        table.add_column(name, justify="right")
    for size, seconds in results.items():
        rates = [pairs / seconds[arrow] for arrow in ARROWS]
        total = pairs / sum(seconds[arrow] for arrow in ARROWS)
        reads = [f"{1000 * seconds[name]:.1f}" for name in ("counts", "unfinished")]
        table.add_row(str(size), *(f"{rate:,.0f}" for rate in (*rates, total, pairs / seconds["cpu"])), *reads)
    Console(width=120).print(table)
    print(json.dumps({"machine": machine(), "pairs": pairs, "tokens": tokens, "seconds": results}))


if __name__ == "__main__":
    typer.run(main)
