"""The study of docs/results.md: ``python -m benchmarks.study``; the same command goes on where it was stopped.

Each setting is a comparison (as ``pilaf-ray compare`` makes it): four samplers, some seeds, one start, one budget of
labels. Those whose names begin with ``small-`` train a policy that ``python -m benchmarks.study_policy`` makes, the
others the packaged model. Policies that are done are judged on prompts of the untouched split, by the reward that
they were trained on and by a neural reward that nothing was trained on, and their checkpoints are removed. What comes
out is written to ``docs/results/study/SETTING.json``; ``--tables`` prints it as the tables of docs/results.md.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.chaos_journal import commit
from benchmarks.machine import machine
from benchmarks.study_pairs import run_pairs, run_z
from benchmarks.study_tables import tables
from pilaf_ray.comparison_run import PlannedRun, execute_run, run_comparison
from pilaf_ray.errors import PilafError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/study"
SAMPLERS = ("vanilla", "hybrid", "best_of_n", "pilaf")
PACKAGED, SMALL = ROOT / "configs/study.yaml", ROOT / "configs/study-small.yaml"
FINAL_SPLIT = "builtin:reviews/final"
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One comparison."""

    name: str
    labels: int
    config: Path = PACKAGED
    """What all runs share."""
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: tuple[str, ...] = ()
    warm_start: int = 0
    """Labels of a vanilla run from which all runs start."""
    prepared: tuple[str, ...] = ()
    """Overrides of the run whose policy they start from instead."""
    starts_with: str = ""
    """The setting whose warm start they share."""


SETTINGS = (
    # Away from the reference: all start where a vanilla run has come to.
    Setting(name="online", labels=240, warm_start=80),
    # π⁺ and π⁻ as far from π as β says: five times as far.
    Setting(name="online-beta-0.5", labels=240, starts_with="online", overrides=("algorithm.beta=0.5",)),
    # An over-fitted start: many passes over few pairs.
    Setting(
        name="overfitted",
        labels=240,
        prepared=(
            "schedule={type: iterative, rounds: 1, pairs_per_round: 16, epochs: 10}",
            "sampler={type: vanilla}",
            "evaluation.every_steps=0",
        ),
    ),
    Setting(
        name="iterative",
        labels=240,
        starts_with="online",
        overrides=("schedule={type: iterative, rounds: 3, pairs_per_round: 80, epochs: 2}",),
    ),
    # The same four with a small policy, and more labels.
    Setting(name="small-online", labels=800, config=SMALL, warm_start=320),
    Setting(
        name="small-online-beta-0.5",
        labels=800,
        config=SMALL,
        starts_with="small-online",
        overrides=("algorithm.beta=0.5",),
    ),
    Setting(
        name="small-overfitted",
        labels=800,
        config=SMALL,
        prepared=(
            "schedule={type: iterative, rounds: 1, pairs_per_round: 32, epochs: 10}",
            "sampler={type: vanilla}",
            "evaluation.every_steps=0",
        ),
    ),
    Setting(
        name="small-iterative",
        labels=384,
        config=SMALL,
        starts_with="small-online",
        overrides=("schedule={type: iterative, rounds: 4, pairs_per_round: 96, epochs: 2}",),
    ),
)


class Study:
    """Runs what is missing of one setting and writes what came out.

    Args:
        folder: where runs go.
        deadline: on the monotonic clock; no run is begun after it.
        labels: of each run; the setting's own number when None.
        samples: responses to each untouched prompt; with 0 policies are kept and judged by a later call.
    """

    def __init__(
        self, setting: Setting, *, folder: Path, results: Path, samplers: Sequence[str], seeds: Sequence[int],
        deadline: float, labels: int | None, samples: int, overrides: Sequence[str], console: Console,
    ) -> None:  # fmt: skip
        self._setting, self._config, self._console = setting, setting.config, console
        self._labels, self._samples = labels or setting.labels, samples
        self._folder, self._file = folder.resolve() / setting.name, results / f"{setting.name}.json"
        self._samplers, self._seeds, self._deadline = samplers, seeds or setting.seeds, deadline
        self._overrides = [*setting.overrides, *overrides]

    def run(self) -> None:
        """Every run of the setting, one after the other.

        Raises:
            PilafError: a run has failed, or there is no time for another one; what is done is written down.
        """
        overrides = [*self._overrides, *self._start()]
        try:
            run_comparison(
                self._config, samplers=self._samplers, seeds=self._seeds, budget=f"labels={self._labels}",
                output=self._folder, overrides=overrides, warm_start=self._setting.warm_start,
                console=self._console, execute=self._execute,
            )  # fmt: skip
            self._judge()
        finally:
            self._write()

    def _start(self) -> list[str]:
        """Where all runs begin, as an override."""
        run = self._folder / "prepared"
        if shared := self._setting.starts_with:
            run = self._folder.parent / shared / "runs/warm-start"
        elif not self._setting.prepared:
            return []
        elif not (run / "report/summary.json").is_file():
            self._console.print("prepared start: running", highlight=False)
            words = [*self._overrides, *self._setting.prepared, f"run.folder={self._folder}", "run.name=prepared"]
            _pilaf_ray("train", str(self._config), *words, "--restartable")
        steps = sorted((run / "checkpoints").glob("step-*"))
        if not steps:
            raise PilafError(f"it starts where the runs of {shared} do, which is not there: run {shared} first")
        return [f"model.init_from={steps[-1]}"]

    def _execute(self, run: PlannedRun) -> None:
        """One run; before it, the judging of what has come together."""
        if len(self._to_be_judged()) >= len(self._samplers):
            self._judge()
        if time.monotonic() > self._deadline:
            self._judge()
            raise PilafError("the time is up: run the same command again, which goes on from here")
        execute_run(run)

    def _to_be_judged(self) -> list[Path]:
        """Runs that are done and still have their policy."""
        runs = sorted(self._folder.glob("runs/*-seed*"))
        return [run for run in runs if (run / "report/summary.json").is_file() and (run / "checkpoints").is_dir()]

    def _judge(self) -> None:
        """Together, since loading the roles takes longer than their work."""
        if self._samples and (runs := self._to_be_judged()):
            judge(runs, samples=self._samples, file=self._folder / "judged.json")
            for run in runs:
                shutil.rmtree(run / "checkpoints")

    def _write(self) -> None:
        """The comparison, and what the judges said of each run."""
        comparison = self._folder / "comparison.json"
        if not comparison.is_file():
            return
        judged = {
            file.parent.name: _final_figures(json.loads(file.read_text()))
            for file in sorted(self._folder.glob("runs/*/final.json"))
        }
        runs = [run.parent.parent for run in sorted(self._folder.glob("runs/*-seed*/report/summary.json"))]
        told = json.loads(comparison.read_text()) | {
            "final": judged,
            "pairs": {
                run.name: {branch: asdict(figures) for branch, figures in run_pairs(run).items()} for run in runs
            },
            "z": {run.name: run_z(run) for run in runs},
            "wall_seconds": {
                run.name: json.loads((run / "report/summary.json").read_text())["wall_seconds"] for run in runs
            },
            "overrides": self._overrides,
            "prepared": self._setting.prepared,
            "warm_start_labels": self._setting.warm_start,
            "starts_with": self._setting.starts_with,
            "commit": commit(),
            "machine": machine(),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(told, indent=1) + "\n")


def judge(runs: Sequence[Path], *, samples: int, file: Path) -> None:
    """Sample the runs' last policies on the untouched prompts; all answers go to ``final.json`` of each run.

    Args:
        samples: responses to each prompt.
        file: what ``pilaf-ray evaluate`` writes of all of them.
    """
    split = f"prompts.evaluation.path={FINAL_SPLIT}"
    words = ["--set", split, "--samples", str(samples), "--output", str(file)]
    _pilaf_ray("evaluate", *map(str, runs), *words)
    told = json.loads(file.read_text())
    for run in runs:
        own = {name: found for name, found in told["results"].items() if name.split("/")[0] in (run.name, REFERENCE)}
        (run / "final.json").write_text(json.dumps(told | {"results": own}))


def _final_figures(evaluation: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Reward, KL and neural reward of each answer, of the policy and of the reference."""
    from pilaf_ray.oracle.positivity import score

    return {
        name if name == REFERENCE else "policy": {
            "rewards": result["rewards"],
            "kls": result["kls"],
            "neural": score(result["prompts"], result["responses"]),
        }
        for name, result in evaluation["results"].items()
    }


def _pilaf_ray(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pilaf_ray", *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise PilafError(f"pilaf-ray {words[0]} failed: {last[0]}")


def main(
    settings: Annotated[
        list[str] | None, typer.Argument(help="Names; all when left out. key=value goes to runs.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Begin no run after so long.")] = 24 * 60.0,
    folder: Annotated[Path, typer.Option(help="Where runs go.")] = Path("runs/study"),
    results: Annotated[Path, typer.Option(help="Where the JSON files go.")] = RESULTS,
    samplers: Annotated[str, typer.Option(help="Samplers.")] = ",".join(SAMPLERS),
    seeds: Annotated[str, typer.Option(help="Seeds; the setting's when left out.")] = "",
    labels: Annotated[int | None, typer.Option(min=1, help="Labels of each run; the setting's when left out.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="To each prompt of the untouched split; 0: judge later.")] = 2,
    only_tables: Annotated[bool, typer.Option("--tables", help="Print what is there; run nothing.")] = False,
) -> None:
    """Run what is missing of the study."""
    console = Console(width=160)
    words = settings or []
    names = [word for word in words if "=" not in word] or [setting.name for setting in SETTINGS]
    unknown = set(names) - {setting.name for setting in SETTINGS}
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: the settings are {', '.join(s.name for s in SETTINGS)}"
        )
    deadline = time.monotonic() + 60 * minutes
    for setting in SETTINGS:
        if setting.name in names and not only_tables:
            try:
                Study(
                    setting, folder=folder, results=results, samplers=samplers.split(","),
                    seeds=[int(seed) for seed in seeds.split(",") if seed], deadline=deadline, labels=labels,
                    samples=samples,
                    overrides=[word for word in words or [] if "=" in word], console=console,
                ).run()  # fmt: skip
            except PilafError as error:
                console.print(f"{setting.name}: {error}", markup=False)
                raise typer.Exit(1) from error
    typer.echo(tables([results / f"{name}.json" for name in names]))


if __name__ == "__main__":
    typer.run(main)
