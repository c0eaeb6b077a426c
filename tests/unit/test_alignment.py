"""Gradient alignment from single responses: the theory's values on exact sets, and samples of a known truth."""

import math

import numpy as np
import pytest
from test_theory import REFERENCE, misalignment, moved, prompt_with

from pilaf_ray.evaluation.alignment import (
    PromptResponses,
    ResponseSet,
    align,
    loss_weights,
    objective_weights,
    sampler_branches,
)
from pilaf_ray.sampling import tabular
from pilaf_ray.sampling.tabular import TabularPrompt

NAMES = ("vanilla", "hybrid", "pilaf", "t_pilaf")
PAIRS = {
    "vanilla": tabular.vanilla_pairs,
    "hybrid": tabular.hybrid_pairs,
    "pilaf": tabular.pilaf_pairs,
    "t_pilaf": tabular.t_pilaf_pairs,
}


def coefficients(beta: float) -> tuple[float, ...]:
    return (0.0, beta, -beta, -1.0)


def log_z(prompt: TabularPrompt, c: float) -> float:
    """log E_π[(π/π_ref)^c], the one value that a response of one token gives."""
    return 0.0 if c in (0.0, -1.0) else math.log(prompt.z(1 if c > 0 else -1))


def exact_sets(prompt: TabularPrompt) -> dict[float, ResponseSet]:
    return {
        c: ResponseSet(
            true_rewards=prompt.true_rewards,
            implicit_rewards=prompt.implicit_rewards,
            log_z=np.full(prompt.policy.size, log_z(prompt, c)),
            probabilities=prompt.mixed(c),
        )
        for c in coefficients(prompt.beta)
    }


def log_policy_gradients(prompt: TabularPrompt) -> np.ndarray:
    return prompt.reward_gradients / prompt.beta


@pytest.mark.parametrize("name", NAMES)
def test_exact_sets_give_the_theorys_gradients_and_residuals(name: str) -> None:
    prompt, h = prompt_with(seed=0, size=12, beta=0.5, z_product=1.19)
    prompt = moved(prompt, h, 1e-3)
    sets, gradients = exact_sets(prompt), log_policy_gradients(prompt)
    objective = objective_weights(sets[0.0]) @ gradients
    np.testing.assert_allclose(objective, prompt.objective_gradient(), atol=1e-15)
    weights = loss_weights(sampler_branches(name, beta=0.5), sets, beta=0.5)
    loss = sum(weights[c] @ gradients for c in sets)
    # T-PILAF is weighted by (1 + Z⁺Z⁻)/2; the others are as they are.
    scale = 0.5 * (1 + prompt.z_product) if name == "t_pilaf" else 1.0
    np.testing.assert_allclose(loss, scale * prompt.loss_gradient(PAIRS[name](prompt)), atol=1e-15)
    residual = misalignment(loss, objective, scale * 0.5 / (1 + prompt.z_product))
    assert residual == pytest.approx(REFERENCE[name], rel=0.05)


def sampled(prompt: TabularPrompt, count: int, rng: np.random.Generator) -> PromptResponses:
    sets, gradients = {}, {}
    for c in coefficients(prompt.beta):
        drawn = rng.choice(prompt.policy.size, size=count, p=prompt.mixed(c))
        sets[c] = ResponseSet(
            true_rewards=prompt.true_rewards[drawn],
            implicit_rewards=prompt.implicit_rewards[drawn],
            log_z=np.full(count, log_z(prompt, c)),
        )
        gradients[c] = log_policy_gradients(prompt)[drawn]
    return PromptResponses(sets=sets, gradients=gradients)


def test_samples_recover_the_cosines_of_many_prompts() -> None:
    """Twelve prompts that share their parameters; the truth is the cosine of the summed exact gradients."""
    prompts = []
    for seed in range(12):
        prompt, h = prompt_with(seed=seed, size=6, beta=1.0, z_product=1.6)
        prompts.append(moved(prompt, h, 2.0))
    rng = np.random.default_rng(0)
    found = {
        result.sampler: result
        for result in align(
            [sampled(p, 200, rng) for p in prompts], samplers=NAMES, beta=1.0, samples=200, resamples=200
        )
    }
    objective = sum(p.objective_gradient() for p in prompts)
    for name in NAMES:
        scales = [(1 + p.z_product) if name == "t_pilaf" else 1.0 for p in prompts]
        loss = sum(s * p.loss_gradient(PAIRS[name](p)) for s, p in zip(scales, prompts, strict=True))
        truth = -loss @ objective / np.linalg.norm(loss) / np.linalg.norm(objective)
        assert found[name].cosine.value == pytest.approx(truth, abs=0.05)
        assert found[name].cosine.low < found[name].cosine.value < found[name].cosine.high


def test_noise_is_taken_out_of_the_cosine() -> None:
    """Four responses a prompt and 200 parameters: noise has most of the norm, and pulls the plain cosine to 0."""
    prompt, h = prompt_with(seed=2, size=200, beta=0.5, z_product=1.2)
    prompt = moved(prompt, h, 0.5)
    loss, objective = prompt.loss_gradient(tabular.hybrid_pairs(prompt)), prompt.objective_gradient()
    truth = -loss @ objective / np.linalg.norm(loss) / np.linalg.norm(objective)
    rng, corrected, plain = np.random.default_rng(1), [], []
    for _ in range(10):
        drawn = [sampled(prompt, 4, rng) for _ in range(40)]
        (result,) = align(drawn, samplers=["hybrid"], beta=0.5, samples=4, resamples=1)
        corrected.append(result.cosine.value)
        plain.append(result.plain_cosine.value)
    assert np.mean(plain) < truth - 0.1
    assert abs(np.mean(corrected) - truth) < 0.04
