"""The report's figures against numbers computed another way."""

import json
import math
import statistics
from pathlib import Path

import pytest

from pilaf_ray.evaluation.report import EvaluationResult, RunTotals, summarize, write_report
from pilaf_ray.evaluation.statistics import mean, paired_gain, standard_error

REWARDS_BEFORE = [0.5, -1.0, 2.0, 0.0, 1.5]
REWARDS_AFTER = [1.5, -0.5, 2.5, 2.0, 1.0]
KLS_AFTER = [2.0, 4.0, 3.0, 1.0, 5.0]


def result(step: int, rewards: list[float], kls: list[float]) -> EvaluationResult:
    count = len(rewards)
    return EvaluationResult(
        step=step,
        prompts=[f"prompt {i}" for i in range(count)],
        responses=[f"answer {i}\nof step {step}" for i in range(count)],
        rewards=rewards,
        kls=kls,
        lengths=[10 + step] * count,
    )


BEFORE = result(0, REWARDS_BEFORE, [0.5, 0.5, 0.0, 0.0, 0.0])
AFTER = result(8, REWARDS_AFTER, KLS_AFTER)
TOTALS = RunTotals(
    pairs=64,
    labels=70,
    steps=8,
    wall_seconds=40.0,
    training_seconds=32.0,
    max_age_steps=1,
    utilization={"generator": 0.9, "learner": 0.5},
    peak_memory_mib={"generator": 1500.0, "learner": 2500.0},
    seconds={"start": 6.0, "training": 32.0},
)


def test_paired_gain_is_the_mean_difference() -> None:
    differences = [y - x for x, y in zip(REWARDS_BEFORE, REWARDS_AFTER, strict=True)]
    gain, error = paired_gain(REWARDS_BEFORE, REWARDS_AFTER)
    assert gain == pytest.approx(statistics.fmean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(5))


def test_pairing_removes_what_prompts_differ_by() -> None:
    base = [float(i) * 10 for i in range(20)]
    assert paired_gain(base, [x + 1.0 for x in base]) == (1.0, 0.0)
    assert standard_error(base) > 10


def test_mean_and_standard_error() -> None:
    assert mean(KLS_AFTER) == 3.0
    assert standard_error(KLS_AFTER) == pytest.approx(statistics.stdev(KLS_AFTER) / math.sqrt(5))
    with pytest.raises(ValueError, match="argument 2"):
        paired_gain([1.0, 2.0], [1.0])


def test_summary_figures() -> None:
    summary = summarize(BEFORE, AFTER, TOTALS, beta=0.1)
    assert summary["reward_before"] == pytest.approx(0.6)
    assert summary["reward_after"] == pytest.approx(1.3)
    assert summary["reward_gain"] == pytest.approx(0.7)
    assert summary["kl"] == pytest.approx(3.0)
    assert summary["objective_before"] == pytest.approx(0.6 - 0.1 * 0.2)
    assert summary["objective_after"] == pytest.approx(1.3 - 0.1 * 3.0)
    assert summary["pairs_per_second"] == pytest.approx(2.0)
    promised = """reward_before reward_after reward_gain reward_gain_se kl objective_before objective_after
        pairs labels steps wall_seconds pairs_per_second max_age_steps utilization peak_memory_mib"""
    assert set(promised.split()) <= summary.keys()


def test_report_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    summary = summarize(BEFORE, AFTER, TOTALS, beta=0.1)
    rows = [{"step": s, "reward/policy": 0.1 * s, "kl/policy": None if s == 3 else 0.2 * s} for s in range(1, 9)]
    text = write_report(
        tmp_path / "report", summary=summary, evaluations=[BEFORE, AFTER], metrics=rows, sample_prompts=3
    )
    assert json.loads((tmp_path / "report" / "summary.json").read_text()) == summary
    assert (tmp_path / "report" / "report.md").read_text() == text
    assert (tmp_path / "report" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "| mean gold reward R | 0.600 | 1.300 |" in text
    assert "| learner | 50% | 2500 |" in text
    assert "- before (+0.50): answer 0 of step 0" in text
    assert text.count("- after") == 3
