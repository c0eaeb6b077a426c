"""T-PILAF's weights, estimates of Z, choosing among candidates, and what pairs cost."""

import math

import numpy as np
import pytest

from pilaf_ray.sampling import tabular
from pilaf_ray.sampling.candidates import best_against_worst, resample_by_reward
from pilaf_ray.sampling.costs import CostCounter, branch_cost, candidate_cost, t_pilaf_cost
from pilaf_ray.sampling.normalizers import RunningLogZ, t_pilaf_branch_probability, t_pilaf_loss_weight
from pilaf_ray.sampling.plans import HybridSampler, PairSampler, PilafSampler, VanillaSampler
from pilaf_ray.types import Prompt


def tilted_prompt() -> tabular.TabularPrompt:
    reference, direction = np.random.default_rng(0).normal(size=(2, 6))
    return tabular.TabularPrompt(
        policy_logits=reference + 2.0 * direction, reference_logits=reference, true_rewards=direction, beta=0.5
    )


def test_branch_probability_gives_the_tabular_sampler() -> None:
    prompt = tilted_prompt()
    p = t_pilaf_branch_probability(math.log(prompt.z(1)), math.log(prompt.z(-1)))
    pairs = (1 - p) * tabular.vanilla_pairs(prompt) + p * tabular.plus_minus_pairs(prompt)
    np.testing.assert_allclose(pairs, tabular.t_pilaf_pairs(prompt), atol=1e-12)
    weight = t_pilaf_loss_weight(math.log(prompt.z(1)), math.log(prompt.z(-1)))
    assert weight == pytest.approx((1 + prompt.z_product) / 2)
    assert p > 0.55


def test_branch_probability_and_weight_at_the_ends() -> None:
    assert t_pilaf_branch_probability(0.0, 0.0) == 0.5 and t_pilaf_loss_weight(0.0, 0.0) == 1.0
    # Below 1 only noise can put the product.
    assert t_pilaf_branch_probability(-3.0, 1.0) == 0.5 and t_pilaf_loss_weight(-3.0, 1.0) == 1.0
    assert t_pilaf_branch_probability(2000.0, 0.0) == 1.0
    assert math.isfinite(t_pilaf_loss_weight(2000.0, 0.0)) and t_pilaf_loss_weight(9.0, 0.0, cap=5.0) == 5.0


def test_running_estimate_by_hand() -> None:
    estimates = RunningLogZ(prior_strength=2.0, decay=1.0)
    assert estimates.estimate("x") == (0.0, 0.0)
    for prompt, value in (("x", 2.0), ("x", 4.0), ("y", 6.0)):
        estimates.observe(prompt, 1, math.log(value))
    plus, minus = estimates.estimate("x")
    assert math.exp(plus) == pytest.approx((2 * 4.0 + 6.0) / 4) and minus == 0.0
    assert math.exp(estimates.estimate("new")[0]) == pytest.approx(4.0)
    assert estimates.samples("x") == (2.0, 0.0) and estimates.samples("new") == (0.0, 0.0)


def test_running_estimate_forgets_and_keeps_within_bounds() -> None:
    estimates = RunningLogZ(prior_strength=0.1, decay=0.9, max_prompts=2)
    for value in [0.0] * 50 + [3.0] * 200:
        estimates.observe("x", -1, value)
    assert estimates.estimate("x")[1] == pytest.approx(3.0, abs=1e-3)
    estimates.observe("y", 1, 5000.0)
    estimates.observe("z", 1, -5000.0)
    assert estimates.samples("x") == (0.0, 0.0) and estimates.samples("y")[0] == 1.0
    assert all(math.isfinite(v) for v in estimates.estimate("y") + estimates.estimate("z"))
    with pytest.raises(ValueError, match="is nan"):
        estimates.observe("x", 1, math.nan)
    with pytest.raises(ValueError, match="decay"):
        RunningLogZ(decay=0.0)


def test_running_estimate_converges_on_samples_of_either_kind() -> None:
    """From π, exp(±r) averages to Z^±; five standard errors."""
    prompt, rng = tilted_prompt(), np.random.default_rng(1)
    estimates, count = RunningLogZ(decay=1.0), 4000
    for y in rng.choice(6, size=count, p=prompt.policy):
        for sign in (1, -1):
            estimates.observe("x", sign, sign * prompt.implicit_rewards[y])
    for estimate, sign in zip(estimates.estimate("x"), (1, -1), strict=True):
        second = prompt.policy @ np.exp(2 * sign * prompt.implicit_rewards)
        error = math.sqrt((second - prompt.z(sign) ** 2) / count)
        assert abs(math.exp(estimate) - prompt.z(sign)) < 5 * error


def test_best_against_worst_and_its_ties() -> None:
    chosen = best_against_worst([0.5, 3.0, -1.0, 3.0, -1.0])
    assert (chosen.index_a, chosen.index_b) == (1, 4)
    flat = best_against_worst([2.0, 2.0, 2.0])
    assert (flat.index_a, flat.index_b) == (0, 2)
    with pytest.raises(ValueError, match="two candidates"):
        best_against_worst([1.0])
    with pytest.raises(ValueError, match="not finite"):
        best_against_worst([1.0, math.nan])


REWARDS = [0.0, 1.0, -1.0, 2.0]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_resampling_frequencies_and_z() -> None:
    """χ² of 20,000 draws over the 16 pairs; the 0.999 quantile at 15 degrees of freedom is 37.7."""
    n, counts = 20_000, np.zeros((4, 4))
    for i in range(n):
        drawn = resample_by_reward(f"pair-{i}", REWARDS)
        counts[drawn.index_a, drawn.index_b] += 1
    plus, minus = np.exp(REWARDS), np.exp(-np.array(REWARDS))
    assert chi_square(counts, n * np.outer(plus / plus.sum(), minus / minus.sum())) < 37.7
    assert drawn.log_z_plus == pytest.approx(math.log(plus.mean()))
    assert drawn.log_z_minus == pytest.approx(math.log(minus.mean()))
    assert resample_by_reward("pair-7", REWARDS) == resample_by_reward("pair-7", REWARDS)


def test_distinct_resampling_never_repeats_and_draws_the_rest_fairly() -> None:
    n, counts = 20_000, np.zeros(4)
    for i in range(n):
        drawn = resample_by_reward(f"pair-{i}", REWARDS, distinct=True)
        assert drawn.index_a != drawn.index_b
        counts[drawn.index_b] += drawn.index_a == 3
    minus = np.exp(-np.array(REWARDS[:3]))
    # 0.999 quantile at 2 degrees of freedom.
    assert chi_square(counts[:3], counts.sum() * minus / minus.sum()) < 13.8


def test_resampling_becomes_best_of_m_for_large_rewards() -> None:
    for i in range(50):
        drawn, hard = resample_by_reward(f"{i}", [1000.0 * r for r in REWARDS]), best_against_worst(REWARDS)
        assert (drawn.index_a, drawn.index_b) == (hard.index_a, hard.index_b)


@pytest.mark.parametrize(
    ("sampler", "forwards"), [(VanillaSampler(), 2), (PilafSampler(beta=0.1), 3), (HybridSampler(), 2)]
)
def test_counted_costs_of_mixtures_equal_the_table(sampler: PairSampler, forwards: int) -> None:
    """Counted over planned pairs, not read from the formula."""
    counter, n = CostCounter(), 4000
    branches = {branch.name: branch for branch in sampler.branches}
    for index in range(n):
        prompt = Prompt(prompt_id=f"p{index}", text="", token_ids=())
        plan = sampler.plan(prompt, run_seed=0, epoch=0, draw=0, index=index)
        counter.add(branch_cost(branches[plan.branch]))
    # The coin's deviation: one forward a pair.
    assert counter.per_pair.sequence_forwards == pytest.approx(forwards, abs=4 / math.sqrt(n) if forwards == 3 else 0)
    assert counter.per_pair.labelled_responses == 2
    assert sampler.expected_forwards == forwards


def test_costs_of_candidates_and_t_pilaf_equal_the_table() -> None:
    implicit, oracle = candidate_cost(8, "implicit_reward"), candidate_cost(8, "oracle")
    assert (implicit.sequence_forwards, implicit.scoring_forwards, implicit.labelled_responses) == (8, 8, 2)
    assert (oracle.sequence_forwards, oracle.scoring_forwards, oracle.labelled_responses) == (8, 0, 8)
    assert t_pilaf_cost(0.5).sequence_forwards == 3 and t_pilaf_cost(1.0).sequence_forwards == 4
    assert CostCounter().per_pair.sequence_forwards == 0
