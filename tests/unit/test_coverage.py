"""How often intervals hold the true value, on synthetic data whose truth is known; all draws are seeded."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from test_alignment import PAIRS, sampled
from test_theory import moved, prompt_with

from pilaf_ray.evaluation.alignment import align
from pilaf_ray.evaluation.comparison import Curve, label_saving, over_seeds
from pilaf_ray.evaluation.measures import calibration_error
from pilaf_ray.evaluation.statistics import LEVEL, Interval, bootstrap_prompts


def coverage(interval: Callable[[int], Interval], truth: float, *, trials: int) -> float:
    found = [interval(trial) for trial in range(trials)]
    return sum(each.low <= truth <= each.high for each in found) / trials


def least(trials: int, *, shortfall: float = 0.0) -> float:
    """Three binomial standard errors below what is promised, and below a known shortfall."""
    return LEVEL - 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials) - shortfall


def test_accuracy_over_prompts_whose_pairs_are_alike() -> None:
    """40 prompts of 6 pairs, each prompt with an accuracy of its own around 0.7: pairs are not independent."""
    rng = np.random.default_rng(0)

    def interval(trial: int) -> Interval:
        right = rng.random((40, 6)) < rng.beta(2.8, 1.2, size=(40, 1))
        return bootstrap_prompts(lambda rows: float(right[rows].mean()), prompts=40, seed=trial, resamples=300)

    # Percentiles of 40 values are a little too narrow.
    assert least(300, shortfall=0.02) < coverage(interval, 0.7, trials=300) < 0.995


def test_calibration_error_of_a_reward_that_is_too_sure() -> None:
    """r̂ says 0.92 where the gold preference is 0.7 on average, and 0.15 where it is 0.3: errors 0.22 and 0.15."""
    rng = np.random.default_rng(1)

    def interval(trial: int) -> Interval:
        high = rng.random(60) < 0.5
        predicted = np.where(high, 0.92, 0.15)
        observed = np.where(high, rng.beta(7, 3, size=60), rng.beta(3, 7, size=60))
        return bootstrap_prompts(
            lambda rows: calibration_error(predicted[rows].tolist(), observed[rows].tolist()),
            prompts=60, seed=trial, resamples=200,
        )  # fmt: skip

    assert least(200, shortfall=0.02) < coverage(interval, 0.5 * 0.22 + 0.5 * 0.15, trials=200) <= 1.0


@pytest.mark.parametrize("seeds", [3, 5])
def test_means_over_few_seeds(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    found = coverage(lambda _: over_seeds(rng.normal(2.0, 0.3, size=seeds).tolist()), 2.0, trials=1000)
    assert least(1000) < found < 2 * LEVEL - least(1000), "Student's interval is exact for normal values"


def line(sampler: str, seed: int, slope: float, noise: np.ndarray) -> Curve:
    """J = slope · labels with noise on each of the evaluations' responses; no KL."""
    labels = np.linspace(0.0, 80.0, len(noise))
    rewards = slope * labels[:, None] + noise
    return Curve(
        sampler=sampler, seed=seed, beta=0.1, labels=labels, generated_tokens=labels, seconds=labels,
        rewards=rewards, kls=np.zeros_like(rewards), forwards=0.0, scoring_forwards=0.0, is_partial=False,
    )  # fmt: skip


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("slope", "base"), [(0.045, 0.02), (0.01, 0.02)])
@pytest.mark.parametrize(("between", "within"), [(0.004, 0.02), (0.001, 0.3)])
def test_label_savings_over_few_seeds(seeds: int, slope: float, base: float, between: float, within: float) -> None:
    """Slopes differ by seed and answers by prompt. The saving is 1 − base/slope; so is the loss, a negative saving."""
    rng = np.random.default_rng(seeds)

    def curve(sampler: str, seed: int, mean: float) -> Curve:
        return line(sampler, seed, rng.normal(mean, between), rng.normal(0.0, within, size=(5, 32)))

    def interval(_: int) -> Interval:
        return label_saving([(curve("a", seed, slope), curve("b", seed, base)) for seed in range(seeds)])

    assert least(150) < coverage(interval, 1 - base / slope, trials=150) <= 1.0


def test_cosines_of_gradients_over_the_prompts_that_were_drawn() -> None:
    """12 prompts with an answer in common that is good: the truth is the cosine of their exact gradients together."""
    rng = np.random.default_rng(7)
    common = rng.normal(size=6)
    population = []
    for seed in range(30):
        prompt, h = prompt_with(seed=seed, size=6, beta=1.0, z_product=1.6)
        population.append(moved(prompt, common + h, 2.0))
    names, hits, trials = ("hybrid", "pilaf"), {"hybrid": 0, "pilaf": 0}, 40
    for _ in range(trials):
        chosen = [population[number] for number in rng.integers(0, len(population), size=12)]
        objective = sum(prompt.objective_gradient() for prompt in chosen)
        drawn = [sampled(prompt, 16, rng) for prompt in chosen]
        for result in align(drawn, samplers=names, beta=1.0, samples=16, resamples=100):
            loss = sum(prompt.loss_gradient(PAIRS[result.sampler](prompt)) for prompt in chosen)
            truth = -loss @ objective / np.linalg.norm(loss) / np.linalg.norm(objective)
            hits[result.sampler] += result.cosine.low <= truth <= result.cosine.high
    assert all(count / trials > least(trials) for count in hits.values()), hits
