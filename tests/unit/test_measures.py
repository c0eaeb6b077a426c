"""Estimates of an evaluation against hand-computed and exact values."""

import math
from pathlib import Path

import numpy as np
import pytest

from pilaf_ray.errors import CheckpointError
from pilaf_ray.evaluation.checkpoints import find_policy
from pilaf_ray.evaluation.evaluator import kl_control
from pilaf_ray.evaluation.measures import (
    adjusted_kls,
    both_orders,
    by_prompt,
    calibration_error,
    distinct,
    measure,
    win_rate,
)
from pilaf_ray.evaluation.report import EvaluationResult
from pilaf_ray.evaluation.verdicts import verdict_pairs


def result_of(*, rewards: list[float], kls: list[float], controls: list[float], samples: int = 1) -> EvaluationResult:
    count = len(rewards)
    return EvaluationResult(
        step=0,
        prompts=[f"prompt {n // samples}" for n in range(count)],
        responses=[f"a b answer {n}" for n in range(count)],
        rewards=rewards,
        kls=kls,
        lengths=[4] * count,
        kl_controls=controls,
        token_ids=[[n] for n in range(count)],
        samples=samples,
    )


def test_both_kl_estimators_find_the_exact_kl_and_the_second_varies_less() -> None:
    rng = np.random.default_rng(0)
    policy, noise = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(8))
    reference = 0.8 * policy + 0.2 * noise
    length, count = 5, 4000
    exact = length * float((policy * np.log(policy / reference)).sum())
    tokens = rng.choice(8, p=policy, size=(count, length))
    rows = [(list(np.log(policy[row])), list(np.log(reference[row]))) for row in tokens]
    kls = [sum(p) - sum(r) for p, r in rows]
    result = result_of(rewards=[0.0] * count, kls=kls, controls=[kl_control(p, r) for p, r in rows])
    adjusted = adjusted_kls(result)
    for estimate in (kls, adjusted):
        assert np.mean(estimate) == pytest.approx(exact, abs=4 * np.std(estimate) / math.sqrt(count))
    assert np.std(adjusted) < 0.6 * np.std(kls)


def test_a_control_of_one_gives_schulmans_estimator() -> None:
    policy, reference = [-1.0, -0.5], [-1.2, -0.1]
    expected = sum(math.exp(r - p) - 1 - (r - p) for p, r in zip(policy, reference, strict=True))
    plain = sum(policy) - sum(reference)
    assert plain + kl_control(policy, reference) == pytest.approx(expected)


def test_j_and_intervals_resample_prompts_not_responses() -> None:
    result = result_of(rewards=[0.0, 2.0, 1.0, 3.0], kls=[1.0, 3.0, 2.0, 2.0], controls=[0.0] * 4, samples=2)
    found = measure(result, beta=0.5)
    assert by_prompt(result.rewards, 2) == [1.0, 2.0]
    assert found.reward.value == 1.5
    assert found.objective.value == 1.5 - 0.5 * 2.0
    # Two prompts with means 1 and 2: no resample can leave [1, 2].
    assert 1.0 <= found.reward.low <= found.reward.high <= 2.0
    assert found.kl.low == found.kl.high == 2.0


def test_distinct_counts_runs_of_words() -> None:
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "a b", "b a"], 2) == pytest.approx(2 / 3)
    assert distinct(["word"], 2) == 1.0


def test_calibration_error_by_hand() -> None:
    # Bin of 0.7: two predictions, observed mean 0.5; bin of 0.2: one, observed 0.
    assert calibration_error([0.7, 0.7, 0.2], [1.0, 0.0, 0.0]) == pytest.approx((2 * 0.2 + 0.2) / 3)
    assert calibration_error([1.0, 0.0], [1.0, 0.0]) == 0.0


def test_implicit_reward_is_right_where_it_orders_as_gold_does() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 2.0, 2.0]
    kls = [2.0, 0.0, 2.0, 0.0, 5.0, 1.0]  # right, wrong, and a gold tie that does not count
    found = measure(result_of(rewards=rewards, kls=kls, controls=[0.0] * 6, samples=2), beta=0.5).implicit_reward
    assert found is not None
    assert found.accuracy.value == 0.5
    assert measure(result_of(rewards=rewards, kls=kls, controls=[0.0] * 6), beta=0.5).implicit_reward is None


def test_win_rate_uses_both_orders_and_leaves_abstentions_out() -> None:
    # A judge that always prefers what it sees first says nothing: ½.
    assert both_orders(1.0, 0.0) == 0.5
    assert both_orders(1.0, None) is None
    rate = win_rate([1.0, 0.5, None, 0.0], samples=1)
    assert rate is not None and rate.value == 0.5
    assert win_rate([None, None], samples=1) is None


def test_verdicts_show_each_side_first_once() -> None:
    ours = result_of(rewards=[0.0, 0.0], kls=[0.0, 0.0], controls=[0.0, 0.0])
    first, second = verdict_pairs(ours, ours)
    assert [pair.plan.present_b_first for pair in first + second] == [False, False, True, True]
    assert [pair.a.text for pair in first] == ours.responses


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_policy_is_found_by_run_by_checkpoint_and_by_folder(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "config.json", '{"run": {}}')
    for step in (5, 10):
        hf = tmp_path / "mine" / "checkpoints" / f"step-{step:06d}" / "learner" / "hf"
        write(hf / "config.json", '{"model_type": "llama"}')
        write(hf / "tokenizer.json", "{}")
    newest = find_policy(tmp_path / "mine")
    assert (newest.name, newest.step, newest.run) == ("mine/step-000010", 10, tmp_path / "mine")
    assert find_policy(tmp_path / "mine" / "checkpoints" / "step-000005").step == 5
    assert find_policy(hf) == newest
    hf.joinpath("tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        find_policy(hf)


def test_what_is_no_policy_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_policy(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run"):
        find_policy(tmp_path)
    write(tmp_path / "config.json", '{"run": {}}')
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        find_policy(tmp_path)
