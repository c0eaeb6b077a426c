"""Where a step of the learner spends its time: `python -m benchmarks.learner_profile configs/quickstart.yaml`.

The learner of a run in this process, one step under PyTorch's profiler after one without; the operations that take
most, and their sum by kind. Products are told with their rate: those of :func:`benchmarks.arithmetic.step_flops` over
the seconds in them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.arithmetic import PairLengths, step_flops
from benchmarks.learner import make_batch, model_matrices
from benchmarks.machine import machine
from pilaf_ray.actors.launch import CPU_ALLOCATOR
from pilaf_ray.build import build_inputs, learner_arguments
from pilaf_ray.config.loader import load_config
from pilaf_ray.data.made_pairs import made_pair
from pilaf_ray.run_folder import RunFolder

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "optimiser": ("aten::_fused_adam",),
}


def kind(operation: str) -> str:
    """Which of ``KINDS`` an operation of the profile is; ``everything else`` if none."""
    return next((name for name, starts in KINDS.items() if operation.startswith(starts)), "everything else")


def profiled_step(words: list[str], config_path: Path, *, pairs: int) -> dict[str, Any]:
    """Seconds of an ordinary step, and of each operation of the next."""
    from torch.profiler import ProfilerActivity, profile

    from pilaf_ray.engines.learner import PolicyLearner
    from pilaf_ray.engines.rendezvous import free_address

    config = load_config(config_path, words)
    inputs = build_inputs(config)
    matrices, _, vocabulary = model_matrices(config.model.policy)
    tokens = config.generation.max_new_tokens
    rows = make_batch(inputs.train.prompts, pairs=pairs, tokens=tokens, shortest=tokens, vocabulary=vocabulary)
    lengths = [PairLengths(prompt=len(row["prompt"]), a=tokens, b=tokens) for row in rows]
    items = [
        made_pair(i, row["prompt"], row["a"], row["b"], probability=1.0, reference=(-200.0, -200.0))
        for i, row in enumerate(rows)
    ]
    address, port = free_address()
    with tempfile.TemporaryDirectory() as folder:
        arguments = learner_arguments(config, inputs, RunFolder(path=Path(folder), attempt=1))
        arguments |= {"world_size": 1, "dump_folder": Path(folder)}
        learner = PolicyLearner(rank=0, master_addr=address, master_port=port, **arguments)
        learner.train_step(1, items)
        started = time.perf_counter()
        learner.train_step(2, items)
        seconds = time.perf_counter() - started
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            learner.train_step(3, items)
    operations = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
    flops = step_flops(matrices, lengths, shared_prompts=config.learner.share_prompts, head_on_prompts=False)
    return {"step_seconds": seconds, "flops": flops, "operations": operations}


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Of the step.")] = 8,
    file: Annotated[Path | None, typer.Option("--results", help="File that gets the JSON as well.")] = None,
) -> None:
    """Print a table and one line of JSON."""
    if CPU_ALLOCATOR.items() - os.environ.items():
        # glibc reads them when a process begins.
        environment = {**os.environ, **CPU_ALLOCATOR, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        raise SystemExit(
            subprocess.call([sys.executable, "-m", "benchmarks.learner_profile", *sys.argv[1:]], env=environment)
        )
    found = profiled_step(overrides or [], config, pairs=pairs)
    operations: dict[str, float] = found["operations"]
    whole = sum(operations.values())
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, seconds in operations.items():
        kinds[kind(name)] += seconds
    table = Table("", "seconds", "of the step")
    for name, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:.2f}", f"{seconds / whole:.1%}")
    table.add_section()
    most = sorted(operations.items(), key=lambda item: -item[1])[:12]
    for name, seconds in most:
        table.add_row(name, f"{seconds:.2f}", f"{seconds / whole:.1%}")
    console = Console(stderr=True, width=120)
    console.print(table)
    rate = found["flops"] / kinds["products"]
    console.print(f"a step without the profiler: {found['step_seconds']:.2f} s; products at {rate / 1e9:.1f} GFLOP/s")
    told = {
        "machine": machine(), "overrides": overrides or [], "pairs": pairs, "step_seconds": found["step_seconds"],
        "flops": found["flops"], "products_flops_per_second": rate, "seconds_by_kind": dict(kinds),
        "seconds_by_operation": dict(most),
    }  # fmt: skip
    print(json.dumps(told))
    if file is not None:
        file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
