"""T-PILAF's weights, and choosing among candidates."""

import math

import numpy as np
import pytest

from pilaf_ray.sampling import tabular
from pilaf_ray.sampling.candidates import best_against_worst, resample_by_reward
from pilaf_ray.sampling.normalizers import t_pilaf_branch_probability, t_pilaf_loss_weight


def tilted_prompt() -> tabular.TabularPrompt:
    reference, direction = np.random.default_rng(0).normal(size=(2, 6))
    return tabular.TabularPrompt(
        policy_logits=reference + 2.0 * direction, reference_logits=reference, true_rewards=direction, beta=0.5
    )


def test_branch_probability_gives_the_tabular_sampler() -> None:
    prompt = tilted_prompt()
    p = t_pilaf_branch_probability(math.log(prompt.z_product))
    pairs = (1 - p) * tabular.vanilla_pairs(prompt) + p * tabular.plus_minus_pairs(prompt)
    np.testing.assert_allclose(pairs, tabular.t_pilaf_pairs(prompt), atol=1e-12)
    assert t_pilaf_loss_weight(math.log(prompt.z_product)) == pytest.approx((1 + prompt.z_product) / 2)
    assert p > 0.55


def test_branch_probability_and_weight_at_the_ends() -> None:
    assert t_pilaf_branch_probability(0.0) == 0.5 and t_pilaf_loss_weight(0.0) == 1.0
    # A single sample of Z⁺Z⁻ may be below 1; only then are draw and weight exact.
    assert t_pilaf_branch_probability(math.log(0.25)) == pytest.approx(0.2)
    assert t_pilaf_loss_weight(math.log(0.25)) == pytest.approx(0.625)
    assert t_pilaf_branch_probability(2000.0) == 1.0 and t_pilaf_branch_probability(-2000.0) == 0.0
    assert math.isfinite(t_pilaf_loss_weight(2000.0)) and t_pilaf_loss_weight(9.0, cap=5.0) == 5.0


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
