"""What labels could say: by hand."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.study_pairs import pair_figures
from pilaf_ray.types import LabeledPair


def pair(branch: str, reward_a: float | None, reward_b: float | None, probability: float) -> LabeledPair:
    label: Any = SimpleNamespace(reward_a=reward_a, reward_b=reward_b)
    whole: Any = SimpleNamespace(label=label, probability=probability, pair=SimpleNamespace(branch=branch))
    return cast(LabeledPair, whole)


def test_gaps_ties_and_bits() -> None:
    found = pair_figures(
        [
            pair("on_policy", 1.0, 1.0, 1.0),
            # σ(ln 3) = ¾, whose entropy is 0.811278 bits.
            pair("on_policy", 1.0986122886681098, 0.0, 1.0),
            pair("interpolated", 0.0, 1.0986122886681098, 1.0),
            pair("interpolated", None, None, 1.0),
        ]
    )
    assert {branch: figures.pairs for branch, figures in found.items()} == {
        "all": 3,
        "on_policy": 2,
        "interpolated": 1,
    }
    own = found["on_policy"]
    assert (own.gap, own.ties, own.bits) == pytest.approx((0.549306, 0.5, 0.094361), abs=1e-6)
    assert (own.agreement, found["interpolated"].agreement, found["all"].agreement) == (1.0, 0.0, 0.5)
    assert found["interpolated"].bits == pytest.approx(0.188722, abs=1e-6)
