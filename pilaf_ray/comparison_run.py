"""``pilaf-ray compare``: every sampler with every seed under one budget, one run after the other, then one report."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pilaf_ray.config.limits import NO_STEP_LIMIT
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ConfigError, RunFolderError
from pilaf_ray.evaluation.comparison import Curve, compare, read_curve
from pilaf_ray.evaluation.comparison_report import comparison_json, comparison_page
from pilaf_ray.evaluation.html_pages import write_page
from pilaf_ray.evaluation.json_files import write_json
from pilaf_ray.evaluation.run_records import read_run
from pilaf_ray.provenance import made_with

BUDGETS = {
    "labels": "max_labels",
    "tokens": "max_generated_tokens",
    "steps": "max_steps",
    "seconds": "max_seconds",
}
WARM_START = "warm-start"
EVALUATIONS = 8
"""Evaluations of a run whose configuration does not say how often."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a comparison."""

    sampler: str
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Where it keeps everything."""
        return Path(self.config.run.folder) / self.config.run.name

    @property
    def is_finished(self) -> bool:
        """Whether it has come to the end of its budget and written its report."""
        return (self.folder / "report" / "summary.json").is_file()


def run_comparison(
    config: Path,
    *,
    samplers: Sequence[str],
    seeds: Sequence[int],
    budget: str,
    output: Path,
    overrides: Sequence[str] = (),
    warm_start: int = 0,
    baseline: str | None = None,
    console: Console | None = None,
    execute: Callable[["PlannedRun"], None] | None = None,
) -> Path:
    """Run what is missing and write the report; returns the page.

    Args:
        samplers: names, or names with settings: ``best_of_n(n=4;scorer=oracle)``.
        budget: ``labels=2000``, or tokens, steps or seconds; the configuration's own limits do not count.
        warm_start: labels that one vanilla run is given first; all runs start from what comes out.
        execute: starts or continues a run and returns when it has ended; a process of its own when left out.

    Raises:
        ConfigError: a sampler, a seed or the budget is not understood, or a run in ``output`` was given another budget.
        RunFolderError: a run has failed; what is finished is reported all the same.
    """
    console = console or Console()
    runs = plan_runs(config, samplers=samplers, seeds=seeds, budget=budget, output=output, overrides=overrides)
    baseline = baseline or ("vanilla" if "vanilla" in samplers else samplers[0])
    if baseline not in samplers:
        raise ConfigError(f"--baseline: '{baseline}' is none of the samplers: {', '.join(samplers)}")
    for run in runs:
        if run.is_finished:
            _require_budget(run)
    if warm_start:
        first = _warm_start(runs[0].config, labels=warm_start)
        _finish(first, execute or execute_run, console)
        runs = [_started_from(run, first.folder) for run in runs]
    try:
        for run in runs:
            _finish(run, execute or execute_run, console)
    finally:
        page = write_comparison(runs, baseline=baseline, budget=budget, output=output)
    return page


def plan_runs(
    config: Path,
    *,
    samplers: Sequence[str],
    seeds: Sequence[int],
    budget: str,
    output: Path,
    overrides: Sequence[str] = (),
) -> list[PlannedRun]:
    """All runs, seed by seed, so that a comparison that is stopped early has samplers side by side."""
    kind, _, amount = budget.partition("=")
    if kind not in BUDGETS or not amount:
        raise ConfigError(f"--budget: '{budget}' is not of the form labels=2000; give {', '.join(BUDGETS)}")
    if len(set(samplers)) < len(samplers) or len(set(seeds)) < len(seeds) or not samplers or not seeds:
        raise ConfigError("--samplers and --seeds: give each at least one name or number, and none twice")
    limits = [f"run.{key}={NO_STEP_LIMIT if key == 'max_steps' else 'null'}" for key in BUDGETS.values()]
    limits = [*limits, f"run.{BUDGETS[kind]}={amount}"]
    runs = []
    for seed in seeds:
        for sampler in samplers:
            words = [
                f"run.seed={seed}",
                f"run.folder={output / 'runs'}",
                f"run.name={re.sub('[^A-Za-z0-9._-]+', '-', sampler).strip('-')}-seed{seed}",
                f"sampler={sampler_settings(sampler)}",
            ]
            settings = load_config(config, [*limits, *overrides, *words])
            every = settings.evaluation.every_steps or max(1, settings.step_limit[0] // EVALUATIONS)
            if settings.step_limit[0] == NO_STEP_LIMIT and not settings.evaluation.every_steps:
                raise ConfigError(f"--budget {budget}: say how often to evaluate: evaluation.every_steps=20, say")
            evaluation = settings.evaluation.model_copy(update={"every_steps": every})
            runs.append(
                PlannedRun(sampler=sampler, seed=seed, config=settings.model_copy(update={"evaluation": evaluation}))
            )
    return runs


def sampler_settings(text: str) -> str:
    """``best_of_n(n=4;scorer=oracle)`` as the YAML of a ``sampler`` section."""
    found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text.strip())
    if found is None:
        raise ConfigError(f"--samplers: '{text}' is neither a name nor of the form best_of_n(n=4;scorer=oracle)")
    settings: dict[str, Any] = {"type": found[1]}
    for part in filter(None, (found[2] or "").split(";")):
        key, separator, value = part.partition("=")
        if not separator:
            raise ConfigError(f"--samplers: '{part}' in '{text}' is not of the form key=value")
        settings[key.strip()] = yaml.safe_load(value)
    return json.dumps(settings)


def _warm_start(config: RunConfig, *, labels: int) -> PlannedRun:
    values = config.model_dump(mode="json")
    values["run"] |= {"name": WARM_START, "max_labels": labels, "max_steps": NO_STEP_LIMIT}
    values["run"] |= {"max_generated_tokens": None, "max_seconds": None}
    values["sampler"] = {"type": "vanilla"}
    values["evaluation"]["every_steps"] = 0
    return PlannedRun(sampler="vanilla", seed=config.run.seed, config=RunConfig.model_validate(values))


def _started_from(run: PlannedRun, folder: Path) -> PlannedRun:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    model = run.config.model.model_copy(update={"init_from": str(newest)})
    return PlannedRun(sampler=run.sampler, seed=run.seed, config=run.config.model_copy(update={"model": model}))


def _finish(run: PlannedRun, execute: Callable[[PlannedRun], None], console: Console) -> None:
    """Start or continue a run, unless it is finished."""
    name = run.config.run.name
    if run.is_finished:
        console.print(f"{name}: finished already", markup=False, highlight=False)
        return
    console.print(f"{name}: running", markup=False, highlight=False)
    execute(run)
    if not run.is_finished:
        raise RunFolderError(f"{name} was stopped: run the same command again, which goes on from here")


def _require_budget(run: PlannedRun) -> None:
    """Raise ConfigError where a finished run had another budget than the one that its results would be shown under."""
    had = json.loads((run.folder / "config.json").read_text())["run"]
    wanted = run.config.run.model_dump(mode="json")
    for key in BUDGETS.values():
        if had[key] != wanted[key]:
            raise ConfigError(
                f"{run.folder} was finished with run.{key}={had[key]}, not {wanted[key]}: "
                "give the budget that it had, or another folder"
            )


def execute_run(run: PlannedRun) -> None:
    """In a process of its own, so that nothing of a run is left for the next."""
    name = run.config.run.name
    file = run.folder.parent.parent / "configs" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run.config.model_dump_json(indent=2))
    command = [sys.executable, "-m", "pilaf_ray", "train", str(file), "--restartable"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RunFolderError(
            f"{name} failed: {last[0]}; mend it and run the same command again, which goes on from here"
        )


def write_comparison(runs: Sequence[PlannedRun], *, baseline: str, budget: str, output: Path) -> Path:
    """comparison.html and comparison.json of the runs that are finished."""
    finished = [run for run in runs if run.is_finished]
    page = output / "comparison.html"
    if not finished:
        return page
    curves: list[Curve] = [read_curve(read_run(run.folder), sampler=run.sampler, seed=run.seed) for run in finished]
    results = compare(curves, baseline=baseline)
    missing = [run.config.run.name for run in runs if not run.is_finished]
    settings = {"budget": budget, "baseline": baseline, "beta": curves[0].beta, "missing": missing}
    # The versions are those of whoever writes the report; a run that was finished before may have had others.
    write_json(comparison_json(results, curves, settings) | {"made_with": made_with()}, output / "comparison.json")
    title = f"Samplers at {budget.replace('=', ' = ')}"
    write_page(page, comparison_page(results, curves, baseline=baseline, title=title, missing=missing))
    return page
