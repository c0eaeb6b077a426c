"""One page about one run or several: ``pilaf-ray report RUN…``."""

from collections.abc import Callable, Sequence
from typing import Any

from pilaf_ray.evaluation.figures import COLOURS, Series, bar_figure, line_figure
from pilaf_ray.evaluation.html_pages import Table, render_page
from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.evaluation.run_records import RunRecord, config_differences
from pilaf_ray.evaluation.statistics import Interval, bootstrap_mean, mean
from pilaf_ray.types import LabeledPair

_CELL = 90
"""Longest text of a setting in the table of differences, in characters."""


def run_report(runs: Sequence[RunRecord], *, sample_prompts: int = 3) -> str:
    """The page as HTML text."""
    labels = _labels(runs)
    return render_page(
        "run_report.html.j2",
        figures=("curves", "training", "usage"),
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs",
        subtitle=", ".join(str(run.path) for run in runs),
        partial=[_partial(run) for run in runs if run.is_partial],
        result=_result_table(runs, labels),
        result_note=_result_note(runs),
        curves=_curves(runs, labels),
        training=_training(runs, labels),
        costs=_cost_table(runs, labels),
        usage=_usage(runs, labels),
        differences=_differences(runs, labels),
        answers=_answers(runs, labels, sample_prompts),
        pairs=[_pair(run, label, pair) for run, label in zip(runs, labels, strict=True) for pair in run.pairs],
    )


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """Names of the runs, or their folders where names are not enough."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _partial(run: RunRecord) -> str:
    return (
        f"Partial: {run.name} has not finished: {run.steps} steps so far, "
        f"last evaluated after step {run.evaluations[-1].step}."
    )


def _colours(runs: Sequence[RunRecord]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(runs))] if len(runs) > 1 else []


def objectives(result: EvaluationResult, beta: float) -> list[float]:
    """R − β·KL of each response."""
    return [reward - beta * kl for reward, kl in zip(result.rewards, result.kls, strict=True)]


def _measures(beta: float) -> list[tuple[str, Callable[[EvaluationResult], Sequence[float]]]]:
    return [
        ("Gold reward R", lambda result: result.rewards),
        ("KL to the reference, nats", lambda result: result.kls),
        ("Objective J = R − β·KL", lambda result: objectives(result, beta)),
    ]


def _result_table(runs: Sequence[RunRecord], labels: Sequence[str]) -> Table:
    head = ["run", "step", "R", "KL", "J", "J at the start", "gain in R", "tokens a response"]
    body = []
    for run, label in zip(runs, labels, strict=True):
        first, last = run.evaluations[0], run.evaluations[-1]
        gains = [after - before for before, after in zip(first.rewards, last.rewards, strict=True)]
        body.append(
            [
                label,
                str(last.step),
                *(_interval(bootstrap_mean(values(last))) for _, values in _measures(run.beta)),
                f"{mean(objectives(first, run.beta)):.3f}",
                _interval(bootstrap_mean(gains)),
                f"{mean(last.lengths):.1f}",
            ]
        )
    return Table(head=head, body=body, colours=_colours(runs))


def _result_note(runs: Sequence[RunRecord]) -> str:
    prompts = sorted({len(run.evaluations[-1].prompts) for run in runs})
    betas = sorted({run.beta for run in runs})
    return (
        f"On {' or '.join(map(str, prompts))} held-out responses, β = {', '.join(f'{beta:g}' for beta in betas)}. "
        "Brackets: 95 % bootstrap intervals over prompts. They hold for these weights; "
        "how far another seed would end from here, only more seeds show."
    )


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _curves(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[str]:
    figures = []
    for position, (title, _) in enumerate(_measures(0.0)):
        series = []
        for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
            values = _measures(run.beta)[position][1]
            points = [bootstrap_mean(values(result)) for result in run.evaluations]
            series.append(
                Series(
                    label=label,
                    x=[result.step for result in run.evaluations],
                    y=[point.value for point in points],
                    low=[point.low for point in points],
                    high=[point.high for point in points],
                    style=number,
                )
            )
        figures.append(line_figure(series, title=title, x_label="optimiser step"))
    frontier = [
        Series(
            label=label,
            x=[mean(result.kls) for result in run.evaluations],
            y=[mean(result.rewards) for result in run.evaluations],
            style=number,
            hollow_start=True,
        )
        for number, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]
    return [*figures, line_figure(frontier, title="Frontier: reward against KL", x_label="KL to the reference, nats")]


def _training(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[str]:
    panels = [
        ("Loss", "loss"),
        ("Reward of training batches", "reward/policy"),
        ("Accuracy of the implicit reward on new pairs", "train/accuracy"),
        ("Accuracy of the reward model on pairs new to it", "reward_model/accuracy"),
        ("Calibration error of the reward model on the same pairs", "reward_model/calibration_error"),
        ("Brier skill of the reward model on the same pairs", "reward_model/brier_skill"),
        ("Reward of the policy's rollouts by the reward model", "rollouts/reward"),
        ("Age of trained pairs, largest of the batch, steps", "age/max"),
    ]
    figures = []
    for title, key in panels:
        series = []
        for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
            known = [(m["step"], m[key]) for m in run.metrics if m.get(key) is not None]
            if known:
                steps, values = zip(*known, strict=True)
                series.append(Series(label=label, x=steps, y=values, style=number, markers=False))
        bounds = {run.config["pipeline"]["max_staleness_steps"] for run in runs}
        limit = (bounds.pop(), "the bound") if key == "age/max" and len(bounds) == 1 else None
        if series:
            figures.append(line_figure(series, title=title, x_label="optimiser step", limit=limit))
    return figures


def _cost_table(runs: Sequence[RunRecord], labels: Sequence[str]) -> Table:
    head = [
        "run",
        "labels",
        "steps",
        "forwards",
        "sampled tokens",
        "training, s",
        "pairs/s",
        "in all, s",
        "oldest pair, steps",
    ]
    body = []
    for run, label in zip(runs, labels, strict=True):
        seconds, summary = run.seconds[-1], run.summary or {}
        pairs = summary.get("pairs", 0)
        body.append(
            [
                label,
                f"{run.labels[-1]:g}",
                str(run.steps),
                f"{sum(line['cost/sequence_forwards'] for line in run.metrics):g}",
                f"{run.generated_tokens[-1]:.0f}",
                f"{seconds:.0f}",
                f"{pairs / seconds:.2f}" if pairs and seconds else "–",
                f"{summary['wall_seconds']:.0f}" if summary else "–",
                f"{max((line['age/max'] for line in run.metrics), default=0):.0f}",
            ]
        )
    return Table(head=head, body=body, colours=_colours(runs))


def _usage(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[str]:
    """Bars from the summaries of the runs that have one."""
    finished = [(n, label, run.summary) for n, (run, label) in enumerate(zip(runs, labels, strict=True)) if run.summary]

    def bars(key: str, scale: Callable[[dict[str, Any]], float]) -> list[tuple[str, str, float, int]]:
        names = list(dict.fromkeys(name for _, _, summary in finished for name in summary[key]))
        return [
            (name, label, summary[key][name] * scale(summary), number)
            for name in names
            for number, label, summary in finished
            if name in summary[key]
        ]

    plans = [
        ("Utilisation: share of training time that a role was busy", "", " %", "utilization", lambda _: 100.0),
        ("Peak memory of each role", "MiB", "", "peak_memory_mib", lambda _: 1.0),
        ("Where the time went", "seconds", "", "seconds", lambda _: 1.0),
    ]
    return [
        bar_figure(bars(key, scale), title=title, x_label=x_label, unit=unit)
        for title, x_label, unit, key, scale in plans
        if finished
    ]


def _differences(runs: Sequence[RunRecord], labels: Sequence[str]) -> Table | None:
    rows = config_differences(runs)
    if not rows:
        return None
    return Table(
        head=["setting", *labels],
        body=[
            [key, *(text if len(text) <= _CELL else text[:_CELL] + "…" for text in row)] for key, row in rows.items()
        ],
    )


def _answers(runs: Sequence[RunRecord], labels: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The first prompts of the first run, with the answers of every run that has them."""
    samples = []
    for prompt in list(dict.fromkeys(runs[0].evaluations[0].prompts))[:count]:
        lines = []
        for run, label in zip(runs, labels, strict=True):
            for word, result in (("before", run.evaluations[0]), ("after", run.evaluations[-1])):
                if prompt in result.prompts:
                    place = result.prompts.index(prompt)
                    who = word if len(runs) == 1 else f"{label}, {word}"
                    text = " ".join(result.responses[place].split())
                    lines.append({"who": who, "reward": result.rewards[place], "text": text})
        samples.append({"prompt": prompt, "lines": lines})
    return samples


def _pair(run: RunRecord, label: str, pair: LabeledPair) -> dict[str, Any]:
    plan, probability = pair.pair.plan, pair.label.probability
    sides = []
    for response, wins, reward in (
        (pair.pair.a, probability, pair.label.reward_a),
        (pair.pair.b, None if probability is None else 1 - probability, pair.label.reward_b),
    ):
        about = f"c = {response.coefficient:+g}" + ("" if reward is None else f", reward {reward:+.2f}")
        verdict = "tied" if wins == 0.5 else "chosen" if wins is not None and wins > 0.5 else "rejected"
        sides.append({"verdict": verdict, "about": about, "text": " ".join(response.text.split())})
    chance = "" if probability in (0.0, 0.5, 1.0, None) else f", P(a ≻ b) = {probability:.2f}"
    about = f"{label}, pair {plan.index}, {plan.branch}, label from {pair.label.source}{chance}"
    return {"prompt": plan.prompt.text, "about": about, "sides": sides}
