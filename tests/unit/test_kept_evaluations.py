"""Evaluations outlive the process, and a resumption takes up those that still count."""

from pathlib import Path

from pilaf_ray.evaluation.kept_evaluations import KeptEvaluations
from pilaf_ray.evaluation.report import EvaluationResult


def result(step: int, reward: float) -> EvaluationResult:
    return EvaluationResult(
        step=step,
        prompts=["p", "q"],
        responses=["a", "b"],
        rewards=[reward, reward + 1],
        kls=[2.0, 4.0],
        lengths=[3, 3],
    )


def test_what_was_kept_comes_back_up_to_the_step_that_counts(tmp_path: Path) -> None:
    kept = KeptEvaluations(tmp_path / "evaluations")
    for step, reward in ((0, 1.0), (5, 2.0), (10, 3.0)):
        kept.add(result(step, reward))
    (tmp_path / "evaluations" / "step-000015.tmp").write_text("{")
    again = KeptEvaluations(tmp_path / "evaluations")
    again.load(until_step=5)
    assert again.results == [result(0, 1.0), result(5, 2.0)]
    assert again.objectives(beta=0.1) == {0: 1.5 - 0.3, 5: 2.5 - 0.3}
