"""What a run folder tells, read back: for reports and comparisons."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from pilaf_ray.errors import RunFolderError
from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.types import LabeledPair


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, finished or not."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[EvaluationResult]
    summary: dict[str, Any] | None
    pairs: list[LabeledPair] = field(default_factory=list)
    """A few trained pairs, from the beginning of the run to its end."""

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config["run"]["name"])

    @property
    def beta(self) -> float:
        """β of J = R − β·KL."""
        return float(self.config["algorithm"]["beta"])

    @property
    def steps(self) -> int:
        """Optimiser steps that were taken."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def is_partial(self) -> bool:
        """Whether the run has not written its own report yet."""
        return self.summary is None

    @cached_property
    def labels(self) -> list[float]:
        """Labels that were trained on, up to each step, beginning with step 0."""
        return self._totals("total/labels")

    @cached_property
    def generated_tokens(self) -> list[float]:
        """Tokens that were sampled for trained pairs and rollouts, up to each step, beginning with step 0."""
        rollouts = (m.get("rollouts/responses", 0.0) * m.get("rollouts/tokens", 0.0) for m in self.metrics)
        pairs = self._totals("total/generated_tokens")
        return [sum(both) for both in zip(pairs, accumulate(rollouts, initial=0.0), strict=True)]

    @cached_property
    def seconds(self) -> list[float]:
        """Wall time of the learner's loop up to each step, beginning with step 0.

        Less what it waited until an evaluation was over. What pairs were late because generators had an evaluation
        beside them is in it.
        """
        return list(accumulate((m["time/wait"] + m["time/train"] + m["time/push"] for m in self.metrics), initial=0.0))

    def _totals(self, key: str) -> list[float]:
        return [0.0, *(m[key] for m in self.metrics)]


def read_run(path: Path, *, sample_pairs: int = 0) -> RunRecord:
    """Read a run folder; one that is still running, or was stopped, gives what it has.

    Raises:
        RunFolderError: the folder holds no run, or one that has not evaluated anything yet.
    """
    config = path / "config.json"
    if not config.is_file():
        raise RunFolderError(f"{path} is not a run folder: it has no config.json; give e.g. runs/quickstart")
    files = sorted((path / "evaluations").glob("step-*.json"))
    if not files:
        raise RunFolderError(f"{path}: nothing was evaluated yet; wait for the run's first evaluation")
    metrics, summary = path / "metrics.jsonl", path / "report" / "summary.json"
    settings = json.loads(config.read_text())
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    if lines and "total/labels" not in lines[0]:
        raise RunFolderError(f"{path} was written by an older version, which did not count costs: run it again")
    return RunRecord(
        path=path,
        config=settings,
        # A line that is being written at this moment is left out.
        metrics=[json.loads(line) for line in lines if line.endswith("}")],
        evaluations=[EvaluationResult(**json.loads(file.read_text())) for file in files],
        summary=json.loads(summary.read_text()) if summary.is_file() else None,
        pairs=_read_pairs(path, settings.get("store", {}).get("url"), sample_pairs),
    )


def _read_pairs(run: Path, url: str | None, count: int) -> list[LabeledPair]:
    """``count`` trained pairs, evenly spread over the run."""
    if not count or (url is None and not (run / "preferences.db").is_file()):
        return []
    from pilaf_ray.store.location import ledger_location
    from pilaf_ray.store.reading import LedgerReader

    location = ledger_location(run, url=url)
    reader = LedgerReader(location.url, namespace=location.namespace)
    try:
        return reader.trained_sample(count)
    finally:
        reader.close()


def config_differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Settings that are not equal in all runs: dotted key to one text a run; the run's own name is left out."""
    flat = [_flatten(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings} - {"run.name"})
    rows = {key: [settings.get(key, "–") for settings in flat] for key in keys}
    return {key: texts for key, texts in rows.items() if len(set(texts)) > 1}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value) if not isinstance(value, str) else value
    return flat
