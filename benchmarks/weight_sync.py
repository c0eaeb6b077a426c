"""What a weight update costs: `python -m benchmarks.weight_sync configs/quickstart.yaml [key=value …]`.

The real publishers and one real engine, in two processes as in a run. Each round copies the weights in memory
(one thread, into memory that was written to before), then publishes them by each transport and has
the engine take them, once idle and once with responses under way. The first round is not counted.
The files are read back from the page cache, as on one machine they are. With `model.lora={rank: 16, alpha: 32}`
adapters are sent, copied and counted instead of all weights; the table's title says how much less that is.

*pause* is the longest stretch without a token around the update, less a usual step of the engine.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.arithmetic import spread
from benchmarks.machine import machine
from benchmarks.workers import Worker
from pilaf_ray.actors.launch import CPU_ALLOCATOR
from pilaf_ray.build import build_inputs, generator_arguments
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.threads import Threads, starting_threads

TRANSPORTS = ("shared_memory", "filesystem", "gloo")


def start(config: RunConfig, folder: Path) -> tuple[Worker, Worker, list[tuple[tuple[int, ...], float]]]:
    """The learner's end, the generator's end, and prompts with coefficients to keep the latter busy."""
    inputs = build_inputs(config)
    publisher = {
        "role": "learner",
        "model_path": config.model.policy,
        "dtype": inputs.dtype,
        "threads": starting_threads(config.learner.cpu_threads),
        "transports": TRANSPORTS,
        "folder": str(folder),
        "deadline_seconds": config.weights.deadline_seconds,
        "lora": config.model.lora and config.model.lora.model_dump(),
    }
    engine = generator_arguments(config, inputs)
    beta = config.algorithm.beta
    coefficients = (0.0, 0.0, beta, -beta)
    requests = [(p.token_ids, coefficients[n % 4]) for n, p in enumerate(inputs.train.prompts)]

    def worker(arguments: dict[str, Any], threads: Threads) -> Worker:
        environment = {"OMP_NUM_THREADS": str(starting_threads(threads)), "HF_HUB_OFFLINE": "1", **CPU_ALLOCATOR}
        return Worker("benchmarks.weight_roles", arguments, environment=environment)

    learner = worker(publisher, config.learner.cpu_threads)
    generator = worker({"role": "generator", "generator": engine}, config.generation.cpu_threads)
    return learner, generator, requests


def measure(config: RunConfig, folder: Path, *, responses: int, repetitions: int) -> dict[str, Any]:
    """Memory copies, and for each transport the updates of every counted round."""
    learner, generator, requests = start(config, folder)
    deadline = config.weights.deadline_seconds
    copies: list[float] = []
    updates: dict[str, list[dict[str, Any]]] = {transport: [] for transport in TRANSPORTS}
    version, size, whole = 0, 0, 0
    try:
        for repetition in range(repetitions + 1):
            copied = learner.ask(transport="memcpy")["seconds"]
            found = {}
            for transport in TRANSPORTS:
                for name, load in (("idle", []), ("busy", requests[:responses])):
                    version += 1
                    published = learner.ask(transport=transport, version=version)
                    size, whole = published["ticket"]["num_bytes"], published["whole"]
                    taken = generator.ask(ticket=published["ticket"], requests=load, deadline_seconds=deadline)
                    found[transport, name] = {"publish": published["seconds"], **taken}
            if repetition == 0:
                continue
            copies.append(copied)
            for transport in TRANSPORTS:
                updates[transport].append({name: found[transport, name] for name in ("idle", "busy")})
    finally:
        learner.close()
        generator.close()
    return {"bytes": size, "whole_bytes": whole, "memcpy": copies, "updates": updates}


def row(transport: str, rounds: list[dict[str, Any]], *, copy: float, size: int) -> dict[str, Any]:
    """Medians of one transport."""
    both = [item["idle"]["publish"] + item["idle"]["seconds"] for item in rounds]
    busy = [item["busy"] for item in rounds if item["busy"]["without_tokens"] and item["busy"]["usual_step"]]
    pauses = [item["without_tokens"] - item["usual_step"] for item in busy]
    return {
        "transport": transport,
        "publish_seconds": statistics.median(item["idle"]["publish"] for item in rounds),
        "take_seconds": statistics.median(item["idle"]["seconds"] for item in rounds),
        "bytes_per_second": size / statistics.median(both),
        "over_memcpy": statistics.median(both) / copy,
        "spread": spread(both),
        "pause_seconds": statistics.median(pauses) if pauses else None,
        "usual_step_seconds": statistics.median(item["usual_step"] for item in busy) if busy else None,
        "responses_that_went_on": [item["busy"]["went_on"] for item in rounds],
    }


def print_table(rows: list[dict[str, Any]], *, copies: list[float], size: int, whole: int) -> None:
    copy = statistics.median(copies)
    what = f"{size / 1e6:.1f} MB of weights"
    if size < whole:
        what = f"{size / 1e6:.1f} MB of adapters, 1/{whole / size:.1f} of {whole / 1e6:.1f} MB of weights"
    table = Table(title=f"{what}; a copy in memory takes {copy:.4f} s ({size / copy / 1e9:.1f} GB/s)")
    heads = ("transport", "publish, s", "take, s", "GB/s", "over memcpy", "spread", "pause, s", "usual step, s")
    for head in heads:
        table.add_column(head, justify="left" if head == "transport" else "right")
    for item in rows:
        pause, step = item["pause_seconds"], item["usual_step_seconds"]
        table.add_row(
            item["transport"],
            f"{item['publish_seconds']:.3f}",
            f"{item['take_seconds']:.3f}",
            f"{item['bytes_per_second'] / 1e9:.2f}",
            f"{item['over_memcpy']:.1f}",
            f"{item['spread']:.0%}",
            "not seen" if pause is None else f"{pause:.3f}",
            "" if step is None else f"{step:.3f}",
        )
    Console(stderr=True, width=120).print(table)


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    responses: Annotated[int, typer.Option(help="Responses under way in the busy updates.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Counted rounds.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where the files are written; a temporary folder.")] = None,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print a table and one line of JSON."""
    config = load_config(config_path, overrides or [])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = measure(config, Path(scratch), responses=responses, repetitions=repetitions)
    copy = statistics.median(found["memcpy"])
    rows = [row(t, rounds, copy=copy, size=found["bytes"]) for t, rounds in found["updates"].items()]
    print_table(rows, copies=found["memcpy"], size=found["bytes"], whole=found["whole_bytes"])
    sizes = {"bytes": found["bytes"], "whole_bytes": found["whole_bytes"]}
    described = {**sizes, "memcpy_seconds": found["memcpy"], "responses": responses}
    result = {"machine": machine(), **described, "repetitions": repetitions, "results": rows}
    print(json.dumps(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
