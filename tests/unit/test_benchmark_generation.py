"""What benchmarks.generation asks its engines for: the pairs that the project's samplers plan."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.generation import DRAFTING, OWN, SAMPLERS, Case, choose_cases, pair_sampler, requests
from pilaf_ray.config.loader import load_config
from pilaf_ray.types import GenerationRequest, Prompt

PROMPTS = [Prompt(prompt_id=str(n), text="", token_ids=(5, n)) for n in range(8)]
CONFIG = Path(__file__).parents[2] / "configs/tiny.yaml"


def asked(sampler: str, *, beta: float = 0.25) -> list[GenerationRequest]:
    return requests(PROMPTS, Case(sampler=sampler, beta=beta, engine=OWN), round_number=1)


def sides(found: list[GenerationRequest]) -> list[tuple[float, float]]:
    """Coefficients of a and b, pair after pair."""
    return [(a.coefficient, b.coefficient) for a, b in zip(found[::2], found[1::2], strict=True)]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("vanilla", {(0.0, 0.0): 8}),
        # The reference's side is the mixture that leaves nothing of the policy.
        ("hybrid", {(0.0, -1.0): 8}),
        ("pilaf", {(0.0, 0.0): 4, (0.25, -0.25): 4}),
    ],
)
def test_coefficients(sampler: str, expected: dict[tuple[float, float], int]) -> None:
    assert Counter(sides(asked(sampler))) == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_they_are_those_of_the_sampler_that_a_run_plans_with(sampler: str) -> None:
    planner = pair_sampler(Case(sampler=sampler, beta=0.25, engine=OWN))
    plans = [planner.plan(PROMPTS[0], run_seed=0, epoch=0, draw=draw, index=draw) for draw in range(64)]
    assert {(plan.coefficient_a, plan.coefficient_b) for plan in plans} == set(sides(asked(sampler)))


def test_every_row_draws_with_the_same_seeds() -> None:
    found = {sampler: asked(sampler) for sampler in SAMPLERS}
    assert {tuple(request.seed for request in some) for some in found.values()} == {tuple(range(16))}
    assert len({request.request_id for some in found.values() for request in some}) == 3 * 16


def test_each_sampler_has_a_row_with_and_without_drafts_and_no_row_is_there_twice() -> None:
    cases = choose_cases(load_config(CONFIG, []), betas="0.7", peers=True)
    assert {(case.sampler, case.engine) for case in cases} >= {(s, e) for s in SAMPLERS for e in (OWN, DRAFTING)}
    assert len({case.name for case in cases}) == len(cases)
    assert cases[0].name == "vanilla"
    assert "hybrid, speculation" in {case.name for case in cases}
