"""Comparing samplers: the numbers from files written by hand, the plan of runs, skipping what is done."""

import html
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pilaf_ray.comparison_run import PlannedRun, plan_runs, run_comparison, sampler_settings
from pilaf_ray.errors import ConfigError, RunFolderError
from pilaf_ray.evaluation.comparison import compare, first_crossing, over_seeds, read_curve
from pilaf_ray.evaluation.comparison_report import comparison_json, comparison_page
from pilaf_ray.evaluation.json_files import defined, write_json
from pilaf_ray.evaluation.run_records import read_run
from pilaf_ray.sampling.plans import BestOfNSampler, HybridSampler, PilafSampler, TPilafSampler, VanillaSampler
from pilaf_ray.types import Prompt

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEPS = (0, 2, 4, 6, 8)


def write_run(folder: Path, rewards: Callable[[int], float], *, forwards: float, seed: int) -> Path:
    """8 steps of 10 labels and 200 tokens, evaluated every second step on 6 prompts; KL is 0.5 a step."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "report").mkdir()
    config = {"run": {"name": folder.name}, "algorithm": {"beta": 0.1}, "learner": {"batch_pairs": 10}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": k, "total/labels": 10.0 * k, "total/generated_tokens": 200.0 * k, "time/wait": 0.5, "time/train": 1.0}
        | {"time/push": 0.5, "cost/sequence_forwards": forwards, "cost/scoring_forwards": 0.0, "age/max": 0}
        for k in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in STEPS:
        noise = np.random.default_rng([seed, step]).normal(size=6)
        result = {
            "step": step,
            "prompts": ["p"] * 6,
            "responses": ["r"] * 6,
            "rewards": (rewards(step) + noise - noise.mean()).tolist(),
            "kls": [0.5 * step] * 6,
            "lengths": [10] * 6,
        }
        (folder / "evaluations" / f"step-{step:06d}.json").write_text(json.dumps(result))
    (folder / "report" / "summary.json").write_text(json.dumps({"wall_seconds": 1.0}))
    return folder


SLOPES = {"vanilla": [0.20, 0.25, 0.30], "pilaf": [0.40, 0.50, 0.60], "hybrid": [0.10, 0.15, 0.20]}
"""Reward a step, by seed; J loses 0.05 a step to the KL."""


def all_curves(folder: Path) -> list:  # type: ignore[type-arg]
    return [
        read_curve(
            read_run(write_run(folder / f"{name}-{seed}", lambda k, s=slope: s * k, forwards=20.0, seed=seed)),
            sampler=name,
            seed=seed,
        )
        for name, slopes in SLOPES.items()
        for seed, slope in enumerate(slopes)
    ]


def test_results_are_the_files_numbers(tmp_path: Path) -> None:
    results = {result.sampler: result for result in compare(all_curves(tmp_path), baseline="vanilla")}
    for name, slopes in SLOPES.items():
        found = results[name]
        # Recomputed from the files, without the code above them.
        folders = [tmp_path / f"{name}-{seed}" for seed in range(3)]
        last = [json.loads((folder / "evaluations" / "step-000008.json").read_text()) for folder in folders]
        rewards = [sum(x["rewards"]) / 6 for x in last]
        kls = [sum(x["kls"]) / 6 for x in last]
        lines = [[json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
        assert found.reward.value == pytest.approx(sum(rewards) / 3)
        assert found.kl.value == pytest.approx(sum(kls) / 3) == 4.0
        assert found.objective.value == pytest.approx(sum(r - 0.1 * k for r, k in zip(rewards, kls, strict=True)) / 3)
        assert found.gain.value == pytest.approx(8 * (np.mean(slopes) - 0.05))
        assert found.labels == lines[0][-1]["total/labels"] == 80
        assert found.generated_tokens == lines[0][-1]["total/generated_tokens"]
        assert found.forwards == sum(line["cost/sequence_forwards"] for line in lines[0])
        assert found.seconds == sum(line["time/wait"] + line["time/train"] + line["time/push"] for line in lines[0])
    advantage = results["pilaf"].advantage
    assert advantage is not None and results["vanilla"].advantage is None
    # Differences 1.6, 2.0, 2.4 at the same seeds: mean 2, standard deviation 0.4, t(0.975, 2) = 4.3027.
    assert (advantage.value, advantage.high - 2.0) == pytest.approx((2.0, 4.3027 * 0.4 / math.sqrt(3)), rel=1e-4)


def test_label_savings_are_where_the_mean_curves_cross(tmp_path: Path) -> None:
    results = {result.sampler: result for result in compare(all_curves(tmp_path), baseline="vanilla")}
    saved, lost = results["pilaf"].label_saving, results["hybrid"].label_saving
    assert saved is not None and lost is not None
    # J a label: vanilla 0.020, pilaf 0.045, hybrid 0.010; vanilla's end is at 1.6.
    assert saved.value == pytest.approx(1 - 0.020 / 0.045) and saved.low < saved.value < saved.high
    assert lost.value == pytest.approx(1 - 0.020 / 0.010), "vanilla needs half the labels for hybrid's end"
    assert lost.high < 0 < saved.low


def recomputed(folder: Path, name: str) -> dict[str, Any]:
    """One sampler's figures from the files of its runs, by other means than the code above."""
    runs = []
    for seed in range(3):
        run = folder / f"{name}-{seed}"
        lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        files = sorted((run / "evaluations").iterdir(), key=lambda file: int(file.stem.split("-")[1]))
        told = [json.loads(file.read_text()) for file in files]
        runs.append(
            {
                "labels": [0.0] + [line["total/labels"] for line in lines if line["step"] in STEPS],
                "R": [statistics.fmean(result["rewards"]) for result in told],
                "KL": [statistics.fmean(result["kls"]) for result in told],
                "tokens": lines[-1]["total/generated_tokens"],
                "forwards": math.fsum(line["cost/sequence_forwards"] for line in lines),
                "seconds": math.fsum(line[f"time/{part}"] for line in lines for part in ("wait", "train", "push")),
            }
        )
    for run in runs:
        run["J"] = [r - 0.1 * kl for r, kl in zip(run["R"], run["KL"], strict=True)]
    return {"runs": runs, "J": [run["J"][-1] for run in runs]}


def student(values: list[float]) -> tuple[float, float, float]:
    """Mean and limits for 3 values; 4.302653 is Student's 97.5 % point for 2 degrees of freedom, from a table."""
    half = 4.302653 * statistics.stdev(values) / math.sqrt(3)
    return statistics.fmean(values), statistics.fmean(values) - half, statistics.fmean(values) + half


def cell(values: list[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*student(values))


def page_rows(page: str) -> list[list[str]]:
    """The texts of all table cells, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL) for row in rows]
    return [[html.unescape(re.sub(r"<[^>]+>", "", text)).strip() for text in row] for row in cells if row]


def test_page_and_json_show_what_the_runs_files_say(tmp_path: Path) -> None:
    curves = all_curves(tmp_path)
    results = compare(curves, baseline="vanilla")
    page = comparison_page(results, curves, baseline="vanilla", title="t", missing=[])
    write_json(comparison_json(results, curves, {"budget": "labels=80"}), tmp_path / "comparison.json")
    numbers = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    shown = page_rows(page)
    gains, costs = shown[: len(SLOPES)], shown[len(SLOPES) : 2 * len(SLOPES)]
    base = recomputed(tmp_path, "vanilla")
    for row, cost, told, name in zip(gains, costs, numbers["results"], SLOPES, strict=True):
        found = recomputed(tmp_path, name)
        runs, objectives = found["runs"], found["J"]
        columns = {
            "reward": [run["R"][-1] for run in runs],
            "kl": [run["KL"][-1] for run in runs],
            "objective": objectives,
            "gain": [run["J"][-1] - run["J"][0] for run in runs],
        }
        assert row[0] == told["sampler"] == name
        assert row[1:5] == [cell(values) for values in columns.values()]
        for key, values in columns.items():
            assert [told[key][part] for part in ("value", "low", "high")] == pytest.approx(student(values), abs=1e-5)
        if name == "vanilla":
            assert row[5:] == ["–", "–"] and told["advantage"] is told["label_saving"] is None
        else:
            less = [ours - theirs for ours, theirs in zip(objectives, base["J"], strict=True)]
            assert row[5] == cell(less)
            saving = told["label_saving"]
            assert saving["value"] == pytest.approx(1 - 0.020 / {"pilaf": 0.045, "hybrid": 0.010}[name])
            # The savings' limits have a test of their own; null is −∞: hybrid's curve may be flat.
            limits = ["never" if saving[part] is None else f"{100 * saving[part]:.0f} %" for part in ("low", "high")]
            assert row[6] == f"{100 * saving['value']:.0f} % [{limits[0]}, {limits[1]}]"
        gain, labels = statistics.fmean(columns["gain"]), runs[0]["labels"][-1]
        totals = [labels, runs[0]["forwards"], 0, runs[0]["tokens"], runs[0]["seconds"]]
        assert cost == [name, f"{gain:.3f}", *(f"{total:.0f}" for total in totals), f"{100 * gain / labels:.3f}"]
        assert [
            told[key] for key in ("labels", "forwards", "scoring_forwards", "generated_tokens", "seconds")
        ] == totals
    for curve in numbers["curves"]:
        run = recomputed(tmp_path, curve["sampler"])["runs"][curve["seed"]]
        for key, name in (("labels", "labels"), ("rewards", "R"), ("kls", "KL"), ("objectives", "J")):
            assert curve[key] == pytest.approx(run[name])


def test_the_savings_limits_are_where_students_test_turns(tmp_path: Path) -> None:
    """J grows by 0.35, 0.45, 0.55 a step against 0.15, 0.20, 0.25, so Fieller's limits are roots of a parabola."""
    (pilaf,) = [result for result in compare(all_curves(tmp_path), baseline="vanilla") if result.sampler == "pilaf"]
    ours, theirs = np.array([0.35, 0.45, 0.55]), np.array([0.15, 0.20, 0.25])
    # mean(u·ours − theirs)² = t²·var(u·ours − theirs)/3 in the share u of the labels that is needed.
    covariance, factor = np.cov(ours, theirs), 4.302653**2 / 3
    roots = np.roots(
        [
            ours.mean() ** 2 - factor * covariance[0, 0],
            -2 * (ours.mean() * theirs.mean() - factor * covariance[0, 1]),
            theirs.mean() ** 2 - factor * covariance[1, 1],
        ]
    )
    assert pilaf.label_saving is not None
    assert (pilaf.label_saving.low, pilaf.label_saving.high) == pytest.approx(
        (1 - max(roots), 1 - min(roots)), abs=0.001
    )


def test_one_seed_shows_values_without_limits(tmp_path: Path) -> None:
    curves = [curve for curve in all_curves(tmp_path) if curve.seed == 0]
    results = compare(curves, baseline="vanilla")
    rows = page_rows(comparison_page(results, curves, baseline="vanilla", title="t", missing=[]))
    assert rows[1][1:] == ["3.200", "4.000", "2.800", "2.800", "1.600", "57 %"]
    told = json.loads(json.dumps(defined(comparison_json(results, curves, {})), allow_nan=False))
    assert told["results"][1]["label_saving"] == {"value": pytest.approx(1 - 0.15 / 0.35), "low": None, "high": None}


def test_crossings() -> None:
    x = np.array([0.0, 10.0, 20.0])
    assert first_crossing(x, np.array([0.0, 1.0, 0.5]), 0.75) == pytest.approx(7.5)
    assert first_crossing(x, np.array([2.0, 1.0, 0.5]), 0.75) == 0.0
    assert first_crossing(x, np.array([0.0, 0.1, 0.5]), 0.75) is None


def test_one_seed_claims_no_interval() -> None:
    only = over_seeds([1.5])
    assert only.value == 1.5 and math.isnan(only.low)


def test_runs_are_planned_under_one_budget() -> None:
    names = ["vanilla", "best_of_n(n=4;scorer=oracle)"]
    runs = plan_runs(QUICKSTART, samplers=names, seeds=[0, 3], budget="labels=64", output=Path("out"))
    assert [run.config.run.name for run in runs] == [
        "vanilla-seed0",
        "best_of_n-n-4-scorer-oracle-seed0",
        "vanilla-seed3",
        "best_of_n-n-4-scorer-oracle-seed3",
    ]
    assert [run.config.step_limit for run in runs] == [(8, "run.max_labels"), (4, "run.max_labels")] * 2
    assert [run.config.evaluation.every_steps for run in runs] == [1, 1, 1, 1]
    assert [run.config.run.seed for run in runs] == [0, 0, 3, 3]
    assert json.loads(sampler_settings("best_of_n(n=4;scorer=oracle)")) == {
        "type": "best_of_n",
        "n": 4,
        "scorer": "oracle",
    }


@pytest.mark.parametrize(
    ("samplers", "budget", "message"),
    [
        (["vanilla"], "labels", "not of the form labels=2000"),
        (["vanilla"], "labels=0", "a budget of 0 trains nothing"),
        (["vanilla", "vanilla"], "labels=64", "none twice"),
        (["best_of_n(n)"], "labels=64", "not of the form key=value"),
        (["pilav"], "labels=64", "sampler"),
        (["vanilla"], "seconds=60", "say how often to evaluate"),
    ],
)
def test_what_is_not_understood_is_refused(samplers: list[str], budget: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_runs(QUICKSTART, samplers=samplers, seeds=[0], budget=budget, output=tmp_path)


def test_a_comparison_goes_on_where_it_stopped_and_reports_what_it_has(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    started: list[str] = []

    def execute(run: PlannedRun) -> None:
        started.append(run.config.run.name)
        if len(started) == 3:
            raise RunFolderError("the third run failed")
        write_run(run.folder, lambda k: 0.1 * k, forwards=20.0, seed=run.seed)
        (run.folder / "config.json").write_text(run.config.model_dump_json())
        (run.folder / "checkpoints" / "step-000008").mkdir(parents=True)

    def again(budget: str = "labels=64") -> Path:
        return run_comparison(
            QUICKSTART, samplers=["vanilla", "pilaf"], seeds=[0, 1], budget=budget, output=tmp_path,
            warm_start=32, execute=execute,
        )  # fmt: skip

    with pytest.raises(RunFolderError, match="third"):
        again()
    assert started == ["warm-start", "vanilla-seed0", "pilaf-seed0"]
    page = (tmp_path / "comparison.html").read_text()
    assert "Partial: not finished yet: pilaf-seed0, vanilla-seed1, pilaf-seed1" in page
    assert again() == tmp_path / "comparison.html"
    assert started[3:] == ["pilaf-seed0", "vanilla-seed1", "pilaf-seed1"]
    page = (tmp_path / "comparison.html").read_text()
    assert "Partial" not in page and "Frontier: reward against KL" in page
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["sampler"] for row in numbers["results"]] == ["vanilla", "pilaf"]
    assert numbers["curves"][0]["labels"] == [0, 20, 40, 60, 80]
    # What is finished is shown under no budget that it did not have.
    with pytest.raises(
        ConfigError, match=r"vanilla-seed0 was finished with run\.max_labels=64, not 128: give the budget"
    ):
        again("labels=128")
    assert json.loads((tmp_path / "comparison.json").read_text()) == numbers and len(started) == 6


def test_the_same_seed_gives_every_sampler_the_same_label_draws() -> None:
    prompt = Prompt(prompt_id="p", text="t", token_ids=(1,))
    samplers = [
        VanillaSampler(),
        PilafSampler(beta=0.1),
        HybridSampler(),
        TPilafSampler(beta=0.1, weighted_coin=True),
        BestOfNSampler(n=4, scorer="oracle"),
    ]
    plans = [sampler.plan(prompt, run_seed=5, epoch=1, draw=0, index=9) for sampler in samplers]
    assert len({(plan.label_seed, plan.present_b_first, plan.pair_id) for plan in plans}) == 1
