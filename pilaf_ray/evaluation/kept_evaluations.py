"""The evaluations of a run, in memory and in its folder."""

import json
from pathlib import Path

from pilaf_ray.evaluation.report import EvaluationResult


class KeptEvaluations:
    """One JSON file an evaluation in ``folder``; survives the run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.results: list[EvaluationResult] = []
        """In order of steps."""

    def add(self, result: EvaluationResult) -> None:
        """Keep ``result`` behind the others."""
        self.results.append(result)
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"step-{result.step:06d}.json"
        # Renamed into place: a kill in the middle must not leave a file that a resumption trips over.
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps({name: getattr(result, name) for name in result.__slots__}))
        unfinished.replace(file)

    def load(self, *, until_step: int) -> None:
        """Take up what earlier attempts left of steps up to ``until_step``."""
        files = sorted(self._folder.glob("step-*.json"))
        known = [file for file in files if int(file.stem.removeprefix("step-")) <= until_step]
        self.results = [EvaluationResult(**json.loads(file.read_text())) for file in known]

    def objectives(self, beta: float) -> dict[int, float]:
        """J by step."""
        return {result.step: result.objective(beta) for result in self.results}
