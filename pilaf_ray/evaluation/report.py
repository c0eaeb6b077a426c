"""The report of a run: summary.json, report.md and curves.png."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilaf_ray.evaluation.statistics import mean, paired_gain, standard_error


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """One held-out evaluation, prompt by prompt."""

    step: int
    prompts: list[str]
    responses: list[str]
    rewards: list[float]
    kls: list[float]
    """Σ_t log π_θ − log π_ref of each response, in nats."""
    lengths: list[int]
    kl_controls: list[float] = field(default_factory=list)
    """Σ_t (u_t − 1), u_t = π_ref(y_t)/π_θ(y_t), of each response: mean 0 under π_θ, and related to its KL."""
    token_ids: list[list[int]] = field(default_factory=list)
    """Tokens of each response, for anyone who wants to score it again."""
    samples: int = 1
    """Responses a prompt; those of one prompt follow each other in every list."""

    def objective(self, beta: float) -> float:
        """J = R − β·KL."""
        return mean(self.rewards) - beta * mean(self.kls)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTotals:
    """What the run spent."""

    pairs: int
    labels: int
    steps: int
    wall_seconds: float
    training_seconds: float
    max_age_steps: int
    utilization: dict[str, float]
    peak_memory_mib: dict[str, float]
    seconds: dict[str, float]
    """Where the time went: the run's phases, and ``learner …`` within training."""
    ended: dict[str, int] = field(default_factory=dict)
    """Pairs that ended untrained, by how: abstained, rejected, expired."""
    costs: dict[str, float] = field(default_factory=dict)
    """What all trained pairs cost together, by the names of ``PairCost``."""
    ended_by: str = ""
    """The setting whose limit ended the run."""


def summarize(before: EvaluationResult, after: EvaluationResult, totals: RunTotals, *, beta: float) -> dict[str, Any]:
    """The figures of ``summary.json``; J = R − β·KL."""
    gain, gain_se = paired_gain(before.rewards, after.rewards)
    return {
        "reward_before": mean(before.rewards),
        "reward_after": mean(after.rewards),
        "reward_gain": gain,
        "reward_gain_se": gain_se,
        "kl": mean(after.kls),
        "kl_se": standard_error(after.kls),
        "objective_before": before.objective(beta),
        "objective_after": after.objective(beta),
        "pairs": totals.pairs,
        "labels": totals.labels,
        "ended": totals.ended,
        "steps": totals.steps,
        "wall_seconds": totals.wall_seconds,
        "training_seconds": totals.training_seconds,
        "pairs_per_second": totals.pairs / max(totals.training_seconds, 1e-9),
        "max_age_steps": totals.max_age_steps,
        "utilization": totals.utilization,
        "peak_memory_mib": totals.peak_memory_mib,
        "seconds": totals.seconds,
        "costs": totals.costs,
        "costs_per_pair": {name: cost / max(totals.pairs, 1) for name, cost in totals.costs.items()},
        "ended_by": totals.ended_by,
    }


def sample_rows(result: EvaluationResult, count: int) -> list[dict[str, Any]]:
    """Rows of the sample table: the first prompts with their answers."""
    columns = zip(result.prompts, result.responses, result.rewards, result.kls, strict=True)
    rows = [{"prompt": p, "response": y, "reward": r, "kl": k} for p, y, r, k in columns]
    return rows[:count]


def learner_seconds(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How the learner spent the training time, over all attempts of the run."""
    keys = {
        "learner waits for pairs": "time/wait",
        "learner trains": "time/train",
        "learner hands out weights": "time/push",
        "learner waits for evaluations": "time/evaluation",
    }
    # Steps that an older version wrote have no time of evaluations.
    return {name: sum(line.get(key, 0.0) for line in metrics) for name, key in keys.items()}


def write_report(
    folder: Path,
    *,
    summary: dict[str, Any],
    evaluations: Sequence[EvaluationResult],
    metrics: Sequence[dict[str, Any]],
    sample_prompts: int,
) -> str:
    """Write the three files; returns the text of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    text = _markdown(summary, evaluations[0], evaluations[-1], sample_prompts)
    (folder / "report.md").write_text(text)
    _draw(folder / "curves.png", evaluations, metrics)
    return text


def _markdown(summary: dict[str, Any], before: EvaluationResult, after: EvaluationResult, sample_prompts: int) -> str:
    s = summary
    ratio = s["reward_gain"] / s["reward_gain_se"] if s["reward_gain_se"] else float("nan")
    lines = [
        "# Report",
        "",
        f"On {len(before.prompts)} held-out prompts:",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| mean gold reward R | {s['reward_before']:.3f} | {s['reward_after']:.3f} |",
        f"| KL to the reference | {mean(before.kls):.3f} | {s['kl']:.3f} |",
        f"| J = R − β·KL | {s['objective_before']:.3f} | {s['objective_after']:.3f} |",
        "",
        f"Gain in reward {s['reward_gain']:.3f} ± {s['reward_gain_se']:.3f} (standard error), "
        f"{ratio:.1f} standard errors.",
        f"{s['pairs']} pairs, {s['labels']} labels, {s['steps']} steps in {s['training_seconds']:.0f} s of training "
        f"({s['pairs_per_second']:.2f} pairs/s), {s['wall_seconds']:.0f} s in all; "
        f"oldest trained pair {s['max_age_steps']} steps. Ended by {s['ended_by']}.",
        "",
        *_cost_table(s),
        "| role | utilisation | peak memory MiB |",
        "|---|---|---|",
    ]
    for role, memory in sorted(s["peak_memory_mib"].items()):
        busy = s["utilization"].get(role)
        lines.append(f"| {role} | {'' if busy is None else f'{busy:.0%}'} | {memory:.0f} |")
    lines += ["", "| where the time went | s | share |", "|---|---|---|"]
    for name, seconds in s["seconds"].items():
        lines.append(f"| {name} | {seconds:.0f} | {seconds / s['wall_seconds']:.0%} |")
    for number in range(min(sample_prompts, len(before.prompts))):
        lines += [
            "",
            f"**{before.prompts[number]}**",
            f"- before ({before.rewards[number]:+.2f}): {' '.join(before.responses[number].split())}",
            f"- after ({after.rewards[number]:+.2f}): {' '.join(after.responses[number].split())}",
        ]
    return "\n".join(lines) + "\n"


def _cost_table(summary: dict[str, Any]) -> list[str]:
    if not summary["costs"]:
        return []
    lines = ["| cost of sampling and labelling | a pair | in all |", "|---|---|---|"]
    for name, total in summary["costs"].items():
        lines.append(f"| {name.replace('_', ' ')} | {summary['costs_per_pair'][name]:.2f} | {total:.0f} |")
    return [*lines, ""]


def _draw(path: Path, evaluations: Sequence[EvaluationResult], metrics: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    steps = [e.step for e in evaluations]
    for panel, batch_key, held_out, errors, title in (
        (
            panels[0],
            "reward/policy",
            [mean(e.rewards) for e in evaluations],
            [standard_error(e.rewards) for e in evaluations],
            "gold reward",
        ),
        (
            panels[1],
            "kl/policy",
            [mean(e.kls) for e in evaluations],
            [standard_error(e.kls) for e in evaluations],
            "KL to the reference (nats)",
        ),
    ):
        known = [(m["step"], m[batch_key]) for m in metrics if m.get(batch_key) is not None]
        if known:
            panel.plot(*zip(*known, strict=True), ".", color="#999999", label="training batches")
        panel.errorbar(steps, held_out, yerr=errors, color="#0072b2", marker="o", label="held out, ± 1 s.e.")
        panel.set_title(title, loc="left")
        panel.set_xlabel("learner step")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
