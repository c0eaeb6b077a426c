"""What the steps of several learners come to: rows, ratios and the table of `benchmarks.learner`."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arithmetic import PairLengths, TrainedMatrices, spread, step_flops

OURS, COMPILED = "pilaf_ray", "pilaf_ray, compiled"
ROWS = {
    OURS: "pilaf_ray",
    COMPILED: "pilaf_ray, compiled layers",
    "trl": "TRL DPOTrainer",
    "trl, our allocator": "TRL DPOTrainer, glibc told what ours is told",
    "forward_backward": "Hugging Face forward and backward alone",
}
PEAK = "matrix_products"

Answers = dict[str, list[dict[str, Any]]]


def product_rates(answers: Answers) -> dict[str, float]:
    """Operations a second by shape, where they were measured."""
    runs = [answer["flops_per_second"] for answer in answers.get(PEAK, [])[1:]]
    return {shape: statistics.median(run[shape] for run in runs) for shape in (runs[0] if runs else ())}


def summarize(
    answers: Answers, matrices: TrainedMatrices, lengths: list[PairLengths], *, shared: bool
) -> list[dict[str, Any]]:
    """One row a learner; the first, untimed step is left out of everything but the loss and the memory."""
    tokens = sum(pair.sequences for pair in lengths)
    best = max(product_rates(answers).values(), default=None)
    rows = []
    for name in ROWS:
        if name not in answers:
            continue
        runs = answers[name]
        seconds = [run["seconds"] for run in runs[1:]]
        flops = step_flops(
            matrices,
            lengths,
            shared_prompts=shared and name in (OURS, COMPILED),
            head_on_prompts=name == "forward_backward",
        )
        rows.append(
            {
                "learner": name,
                "first_loss": runs[0]["loss"],
                "seconds": seconds,
                "spread": spread(seconds),
                "tokens_per_second": tokens / statistics.median(seconds),
                "flops": flops,
                "of_matmul_peak": flops / statistics.median(seconds) / best if best else None,
                "peak_mib": runs[-1]["peak_mib"],
                "before_model_mib": runs[-1]["before_model_mib"],
                "threads": runs[-1]["threads"],
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours over each other learner: tokens/s, and peak memory with and without what libraries take."""
    by_name = {row["learner"]: row for row in rows}
    ours = by_name.get(OURS)
    if ours is None:
        return {}

    def own(row: dict[str, Any]) -> float:
        return float(row["peak_mib"] - row["before_model_mib"])

    return {
        name: {
            "tokens_per_second": ours["tokens_per_second"] / row["tokens_per_second"],
            "peak_memory": ours["peak_mib"] / row["peak_mib"],
            "peak_memory_without_libraries": own(ours) / own(row),
        }
        for name, row in by_name.items()
        if name != OURS
    }


def check_same_batch(rows: list[dict[str, Any]], *, tolerance: float) -> None:
    """Both DPO learners must see one loss before their first update, or they were not given the same batch."""
    losses = {row["learner"]: row["first_loss"] for row in rows if row["learner"] != "forward_backward"}
    if max(losses.values(), default=0.0) - min(losses.values(), default=0.0) > tolerance:
        raise SystemExit(f"the learners start with different losses, so this compares nothing: {losses}")


def check_same_training(answers: Answers, *, tolerance: float) -> None:
    """Compiled layers must give the losses of ours at every step, or their gradients are others."""
    pairs = zip(answers.get(OURS, []), answers.get(COMPILED, []), strict=False)
    losses = [(ours["loss"], compiled["loss"]) for ours, compiled in pairs]
    if any(abs(ours - compiled) > tolerance for ours, compiled in losses):
        raise SystemExit(f"with compiled layers the training is another, so this compares nothing: {losses}")


def print_table(rows: list[dict[str, Any]], found: dict[str, dict[str, float]], products: dict[str, float]) -> None:
    table = Table()
    heads = ("learner", "tokens/s", "s a step", "spread", "of matmul peak", "peak MiB", "of it libraries", "first loss")
    for head in heads:
        table.add_column(head, justify="left" if head == "learner" else "right")
    for row in rows:
        share = row["of_matmul_peak"]
        table.add_row(
            ROWS[row["learner"]],
            f"{row['tokens_per_second']:.0f}",
            f"{statistics.median(row['seconds']):.2f}",
            f"{row['spread']:.0%}",
            "" if share is None else f"{share:.0%}",
            f"{row['peak_mib']:.0f}",
            f"{row['before_model_mib']:.0f}",
            f"{row['first_loss']:.4f}" if row["first_loss"] is not None else "",
        )
    console = Console(stderr=True, width=130)
    console.print(table)
    for name, values in found.items():
        console.print(
            f"pilaf_ray over {ROWS[name]}: {values['tokens_per_second']:.2f} of the tokens/s, "
            f"{values['peak_memory']:.2f} of the peak memory "
            f"({values['peak_memory_without_libraries']:.2f} without libraries)"
        )
    for shape, rate in products.items():
        console.print(f"torch.mm {shape}: {rate / 1e9:.1f} GFLOP/s")
