"""One DPO step beside TRL's: `python -m benchmarks.learner configs/quickstart.yaml [key=value …]`.

Our learner as a run has it, TRL's DPOTrainer, a bare Hugging Face forward and backward of the same tokens, and
products of matrices alone, each in a process of its own; they take steps in turn, so that a slow moment of the machine
falls on all of them. The first step of each is not counted. Prompts are the configuration's, tokens of responses are
drawn at random, and log π_ref is given with them: neither side runs a reference.

``--compiled`` adds our learner with decoder layers that torch.compile has seen, which takes minutes before the first
step (benchmarks/learner_compiled.py); its losses must be ours at every step.

Tokens are those of both sequences of each pair, prompt included, whoever computes the prompt once or twice. The share
of the matmul peak counts six operations an element and token (benchmarks/arithmetic.py), prompts once where
``learner.share_prompts`` is on, over the fastest ``torch.mm``: of a micro-batch with a matrix of the model's, or of two
square matrices.
Memory is the largest resident set of each process during its steps, and as much of it as was there before
the model was loaded (the interpreter and its libraries).
"""

import json
import math
import os
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.arithmetic import PairLengths, TrainedMatrices
from benchmarks.learner_rows import (
    COMPILED,
    OURS,
    PEAK,
    ROWS,
    Answers,
    check_same_batch,
    check_same_training,
    print_table,
    product_rates,
    ratios,
    summarize,
)
from benchmarks.machine import machine
from benchmarks.workers import Worker
from pilaf_ray.actors.launch import CPU_ALLOCATOR
from pilaf_ray.build import RunInputs, build_inputs, learner_arguments
from pilaf_ray.config.algorithms import DpoConfig
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.threads import starting_threads
from pilaf_ray.types import Prompt

SQUARE = (1024, 1024, 1024)
"""A product that suits the core, beside those that the model asks for."""


def make_batch(
    prompts: tuple[Prompt, ...], *, pairs: int, tokens: int, shortest: int, vocabulary: int
) -> list[dict[str, Any]]:
    """Pairs of random tokens; log π_ref is made up, because what it is does not change the work."""
    draw = random.Random(0)

    def response() -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(shortest, tokens))]

    batch = []
    for number in range(pairs):
        a, b = response(), response()
        batch.append(
            {
                "prompt": list(prompts[number % len(prompts)].token_ids),
                "a": a,
                "b": b,
                "reference_a": -math.log(vocabulary) * len(a) + draw.gauss(0, 3),
                "reference_b": -math.log(vocabulary) * len(b) + draw.gauss(0, 3),
            }
        )
    return batch


def model_matrices(path: str) -> tuple[TrainedMatrices, list[tuple[int, int]], int]:
    """Sizes of the model's matrices, the different shapes (in, out) among them, and the vocabulary; no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    head = network.get_output_embeddings()
    linear = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    shapes = sorted({(module.in_features, module.out_features) for module in linear})
    layers = sum(module.in_features * module.out_features for module in linear if module is not head)
    matrices = TrainedMatrices(layers=layers, head=head.in_features * head.out_features)
    return matrices, shapes, network.config.get_text_config().vocab_size


def measure(workers: dict[str, Worker], repetitions: int) -> Answers:
    """Steps in turn; the first round is not counted, but its losses are kept."""
    answers: Answers = {name: [] for name in workers}
    try:
        for _ in range(repetitions + 1):
            for name, worker in workers.items():
                answers[name].append(worker.ask())
    finally:
        for worker in workers.values():
            worker.close()
    return answers


def start_workers(
    settings: dict[str, dict[str, Any]], batch: list[dict[str, Any]], *, threads: int, without: set[str]
) -> dict[str, Worker]:
    """One process a row of the table, and one for the products."""
    workers = {}
    for name in [*ROWS, PEAK]:
        variant = name.partition(",")[0]
        if {name, variant} & without:
            continue
        ours = variant == OURS or "our allocator" in name
        own = settings[variant] | ({"compiled": True} if name == COMPILED else {})
        message = {"variant": variant, "batch": batch, "threads": threads, "settings": own}
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "DS_ACCELERATOR": "cpu",
        }
        workers[name] = Worker(
            "benchmarks.learner_variants", message, environment=environment | (CPU_ALLOCATOR if ours else {})
        )
    return workers


def variant_settings(
    config: RunConfig,
    inputs: RunInputs,
    folder: Path,
    *,
    threads: int,
    shapes: list[tuple[int, int, int]],
    trl_pairs: int,
) -> dict[str, dict[str, Any]]:
    """What each variant is told; TRL's come from ours."""
    given = learner_arguments(config, inputs, RunFolder(path=folder, attempt=1))
    if given["lora"] is not None:
        raise SystemExit("model.lora: TRL trains all weights here")
    ours = given | {
        "offload": asdict(given["offload"]),
        "world_size": 1,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "label_smoothing": 0.0,
        "cpu_threads": threads,
        "dump_folder": str(folder),
    }
    bare = {"model_path": ours["model_path"], "precision": ours["precision"]}
    names = ("beta", "learning_rate", "betas", "weight_decay", "max_grad_norm", "gradient_checkpointing")
    trl = bare | {name: ours[name] for name in names} | {"pairs_per_forward": trl_pairs}
    products = {"precision": ours["precision"], "shapes": shapes, "shape_seconds": 0.3}
    return {OURS: ours, "trl": trl, "forward_backward": bare, PEAK: products}


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    repetitions: Annotated[int, typer.Option(help="Counted steps of each learner.")] = 5,
    pairs: Annotated[int | None, typer.Option(help="Pairs of the batch; learner.batch_pairs when left out.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of every learner; learner.cpu_threads when left out.")] = None,
    shortest: Annotated[float, typer.Option(help="Shortest response, as a share of max_new_tokens.")] = 1.0,
    trl_pairs: Annotated[int, typer.Option(help="Pairs of one of TRL's forwards; 0: all of them.")] = 0,
    without: Annotated[list[str] | None, typer.Option(help="A learner to leave out; may be repeated.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also ours with compiled decoder layers.")] = False,
    results: Annotated[Path | None, typer.Option(help="File that gets the JSON as well.")] = None,
) -> None:
    """Print a table and one line of JSON."""
    config = load_config(config_path, overrides or [])
    if not isinstance(config.algorithm, DpoConfig):
        raise SystemExit("algorithm.type: the comparison with TRL is one of DPO")
    count, cores = pairs or config.learner.batch_pairs, threads or starting_threads(config.learner.cpu_threads)
    if trl_pairs and count % trl_pairs:
        raise SystemExit(f"--trl-pairs must divide the batch of {count} pairs")
    matrices, shapes, vocabulary = model_matrices(config.model.policy)
    longest = config.generation.max_new_tokens
    inputs = build_inputs(config)
    batch = make_batch(
        inputs.train.prompts,
        pairs=count,
        tokens=longest,
        shortest=max(1, round(shortest * longest)),
        vocabulary=vocabulary,
    )
    lengths = [PairLengths(prompt=len(row["prompt"]), a=len(row["a"]), b=len(row["b"])) for row in batch]
    rows_of_peak = min(config.learner.micro_batch_tokens, sum(pair.sequences for pair in lengths))
    products = [(rows_of_peak, width, out) for width, out in shapes] + [SQUARE]
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        settings = variant_settings(config, inputs, Path(folder), threads=cores, shapes=products, trl_pairs=trl_pairs)
        left_out = {*(without or []), *(() if compiled else (COMPILED,))}
        workers = start_workers(settings, batch, threads=cores, without=left_out)
        answers = measure(workers, repetitions)
    rows = summarize(answers, matrices, lengths, shared=config.learner.share_prompts)
    tolerance = 1e-3 if settings["trl"]["precision"] == "float32" else 0.05
    check_same_batch(rows, tolerance=tolerance)
    check_same_training(answers, tolerance=tolerance)
    found = ratios(rows)
    peaks = product_rates(answers)
    print_table(rows, found, peaks)
    described = {
        "pairs": count,
        "threads": cores,
        "precision": settings["trl"]["precision"],
        "tokens": sum(pair.sequences for pair in lengths),
        "matrices": {"layers": matrices.layers, "head": matrices.head},
        "repetitions": repetitions,
        "load_average": {"before": load, "after": os.getloadavg()},
        "learner": config.learner.model_dump(mode="json"),
    }
    result = {"machine": machine(), **described, "results": rows, "ours_over": found, "torch_mm": peaks}
    print(json.dumps(result))
    if results is not None:
        results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
