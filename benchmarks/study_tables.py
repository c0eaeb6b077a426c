"""The study's results as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from pilaf_ray.evaluation.comparison import over_seeds
from pilaf_ray.evaluation.statistics import LEVEL, Interval

_MEASURES = ("reward", "kl", "objective", "neural")
MOST_SEEDS = 1000


def tables(files: Sequence[Path]) -> str:
    """Of each setting: held-out in training, the untouched split with both rewards, what labels told, the spread."""
    parts = []
    for file in files:
        if file.is_file():
            told = json.loads(file.read_text())
            parts += [f"### {file.stem}", _course(told), _final(told), _labels(told), _spread(told)]
            if told["settings"]["missing"]:
                parts.append(f"Not finished: {', '.join(told['settings']['missing'])}.")
    return "\n\n".join(parts)


def _course(told: dict[str, Any]) -> str:
    base = told["settings"]["baseline"]
    rows = [f"| sampler | R | KL | J | J less {base}'s | labels saved at {base}'s J | forwards | tokens | seconds |",
            "|---|---|---|---|---|---|---:|---:|---:|"]  # fmt: skip
    for result in told["results"]:
        saved = result["label_saving"]
        rows.append(
            f"| {result['sampler']} | {_text(result['reward'])} | {_text(result['kl'])} | {_text(result['objective'])} "
            f"| {_text(result['advantage'])} | {_percent(saved)} | {result['forwards']:.0f} "
            f"| {result['generated_tokens']:.0f} | {result['seconds']:.0f} |"
        )
    return "\n".join(rows)


def _final(told: dict[str, Any]) -> str:
    """Means over seeds of each run's mean over untouched prompts; differences are paired by seed."""
    base = told["settings"]["baseline"]
    beta = told["settings"]["beta"]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for curve in told["curves"]:
        figures = told["final"].get(run_name(curve["sampler"], curve["seed"]))
        if figures:
            found.setdefault(curve["sampler"], {})[curve["seed"]] = _means(figures["policy"], beta)
    head = f"| untouched prompts | R | KL | J | neural reward | J less {base}'s | neural reward less {base}'s |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for sampler, seeds in found.items():
        cells = [_interval([means[key] for means in seeds.values()]) for key in _MEASURES]
        for key in ("objective", "neural"):
            against = {seed: means[key] for seed, means in found.get(base, {}).items()}
            differences = [means[key] - against[seed] for seed, means in seeds.items() if seed in against]
            cells.append("–" if sampler == base else _interval(differences))
        rows.append(f"| {sampler} | {' | '.join(cells)} |")
    start = [_means(f["reference"], beta) for f in told["final"].values()]
    if start:
        mean = {key: float(np.mean([values[key] for values in start])) for key in start[0]}
        rows.append(f"| the reference | {mean['reward']:.3f} | {mean['kl']:.3f} | {mean['objective']:.3f} "
                    f"| {mean['neural']:.3f} | | |")  # fmt: skip
    return "\n".join(rows)


def _labels(told: dict[str, Any]) -> str:
    """What the pairs of each branch were worth; means over seeds."""
    rows = [
        "| pairs asked about | \\|Δr*\\| | ties | bits a label | labels for the better | Z⁺Z⁻ |",
        "|---|---|---:|---|---:|---|",
    ]
    for sampler in dict.fromkeys(curve["sampler"] for curve in told["curves"]):
        names = [run_name(c["sampler"], c["seed"]) for c in told["curves"] if c["sampler"] == sampler]
        runs = [told["pairs"][name] for name in names]
        products = [told["z"][name]["product"] for name in names if "product" in told["z"][name]]
        branches = [branch for branch in runs[0] if branch != "all"]
        for branch in ["all", *(branches if len(branches) > 1 else [])]:
            found = [run[branch] for run in runs if branch in run]
            gap, bits = (_interval([figures[key] for figures in found]) for key in ("gap", "bits"))
            ties, better = (float(np.mean([figures[key] for figures in found])) for key in ("ties", "agreement"))
            name = sampler if branch == "all" else f"{sampler}, {branch}"
            z = _interval(products) if branch == "all" else "–"
            rows.append(f"| {name} | {gap} | {100 * ties:.1f} % | {bits} | {100 * better:.0f} % | {z} |")
    return "\n".join(rows)


def _spread(told: dict[str, Any]) -> str:
    """How far seeds lie apart, differences paired by seed, and how many seeds it would take to see what was seen."""
    base = told["settings"]["baseline"]
    head = (
        f"| paired by seed | R less {base}'s | KL less {base}'s | J's deviation over seeds | of J less {base}'s "
        "| seeds to tell |"
    )
    rows = [head, "|---|---|---|---:|---:|---:|"]
    for sampler in dict.fromkeys(curve["sampler"] for curve in told["curves"]):
        deviation = _deviation(list(_ends(told, sampler, "objectives").values()))
        if sampler == base:
            rows.append(f"| {sampler} | – | – | {deviation} | – | – |")
            continue
        reward, kl, objective = (_paired(told, sampler, base, key) for key in ("rewards", "kls", "objectives"))
        rows.append(
            f"| {sampler} | {_interval(reward)} | {_interval(kl)} | {deviation} | {_deviation(objective)} "
            f"| {_seeds_to_tell(objective)} |"
        )
    return "\n".join(rows)


def _ends(told: dict[str, Any], sampler: str, key: str) -> dict[int, float]:
    """The last value of each seed's curve."""
    return {curve["seed"]: curve[key][-1] for curve in told["curves"] if curve["sampler"] == sampler}


def _paired(told: dict[str, Any], sampler: str, base: str, key: str) -> list[float]:
    against = _ends(told, base, key)
    return [value - against[seed] for seed, value in _ends(told, sampler, key).items() if seed in against]


def _deviation(values: Sequence[float]) -> str:
    return f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "–"


def _seeds_to_tell(differences: Sequence[float]) -> str:
    """The fewest seeds whose 95 % interval would leave zero out, had more of them the same mean and spread."""
    if len(differences) < 2:
        return "–"
    mean, deviation = abs(float(np.mean(differences))), float(np.std(differences, ddof=1))
    seeds = np.arange(2, MOST_SEEDS + 1)
    enough = seeds[t.ppf((1 + LEVEL) / 2, seeds - 1) * deviation / np.sqrt(seeds) < mean]
    return str(enough[0]) if enough.size else f"over {MOST_SEEDS}"


def run_name(sampler: str, seed: int) -> str:
    """The folder of a run."""
    return f"{sampler}-seed{seed}"


def _means(answers: dict[str, list[float]], beta: float) -> dict[str, float]:
    reward, kl, neural = (float(np.mean(answers[key])) for key in ("rewards", "kls", "neural"))
    return {"reward": reward, "kl": kl, "objective": reward - beta * kl, "neural": neural}


def _interval(values: Sequence[float]) -> str:
    return str(over_seeds(values)) if len(values) > 1 else (f"{values[0]:.3f}" if values else "–")


def _text(interval: dict[str, float | None] | None) -> str:
    if interval is None:
        return "–"
    value, low, high = interval["value"], interval["low"], interval["high"]
    assert value is not None
    return f"{value:.3f}" if low is None or high is None else str(Interval(value, low, high))


def _percent(interval: dict[str, float | None] | None) -> str:
    if interval is None:
        return "–"
    limits = [interval[key] for key in ("value", "low", "high")]
    value, low, high = ("never" if limit is None else f"{100 * limit:.0f} %" for limit in limits)
    # One seed has no limits; else only what is never saved is null.
    return value if limits[2] is None else f"{value} [{low}, {high}]"
