"""Function oracles and label rules."""

from collections.abc import Sequence

import pytest
from pairs import plan, response

from pilaf_ray.errors import ConfigError, OracleError
from pilaf_ray.oracle.function import FunctionOracle
from pilaf_ray.oracle.label_rules import ArgmaxRule, BradleyTerryRule, SoftRule, sigmoid
from pilaf_ray.types import ResponsePair


def oracle(name: str, kind: str = "score", scale: float = 1.0) -> FunctionOracle:
    return FunctionOracle(target=f"oracle_functions:{name}", kind=kind, scale=scale, rule=SoftRule())


def pairs(count: int) -> list[ResponsePair]:
    return [ResponsePair(plan=plan(i), a=response("long text"), b=response("short")) for i in range(count)]


@pytest.mark.parametrize("name", ["lengths", "lengths_async"])
async def test_scores_become_bradley_terry_probabilities(name: str) -> None:
    labels = await oracle(name, scale=0.5).label(pairs(2))
    assert [(x.reward_a, x.reward_b) for x in labels] == [(4.5, 2.5)] * 2
    assert labels[0].probability == pytest.approx(sigmoid(2.0))


async def test_presentation_order_is_shown_and_undone() -> None:
    """A comparer that always prefers what it sees first must not favour a side."""
    labels = await oracle("first", kind="compare").label(pairs(4))
    assert [x.probability for x in labels] == [1.0, 0.0, 1.0, 0.0]


async def test_none_abstains() -> None:
    [label] = await oracle("abstains", kind="compare").label(pairs(1))
    assert label.is_abstention and label.reason is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "oracle_functions:raises raised ValueError: no idea"),
        ("not_a_number", "returned nan; give finite numbers"),
        ("too_few", "gave 1 answers for 4 inputs"),
    ],
)
async def test_bad_functions_are_named_in_one_line(name: str, message: str) -> None:
    with pytest.raises(OracleError, match=message) as caught:
        await oracle(name).label(pairs(2))
    assert "\n" not in str(caught.value)


def test_missing_function_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="cannot import"):
        oracle("does_not_exist")


def frequencies(rule: BradleyTerryRule, difference: float, seeds: Sequence[int]) -> float:
    return sum(rule(difference, seed) for seed in seeds) / len(seeds)


def test_bradley_terry_draws_with_the_right_frequency() -> None:
    expected = sigmoid(0.8 / 2.0)
    share = frequencies(BradleyTerryRule(temperature=2.0), 0.8, range(10_000))
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 10_000) ** 0.5
    assert BradleyTerryRule()(0.3, 7) == BradleyTerryRule()(0.3, 7)


def test_argmax_and_extreme_differences() -> None:
    assert [ArgmaxRule()(d, 0) for d in (1.0, -1.0, 0.0)] == [1.0, 0.0, 0.5]
    assert SoftRule()(-1000.0, 0) == 0.0 and SoftRule()(1000.0, 0) == 1.0
