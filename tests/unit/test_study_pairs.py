"""What labels could say: by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.study_pairs import pair_figures, run_z
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


def test_z_is_the_mean_of_the_steps_that_mixed(tmp_path: Path) -> None:
    steps = [(1.2, 0.8, 1.0), (None, None, None), (1.4, 0.9, 1.1)]
    lines = [{"z/plus": plus, "z/minus": minus, "z/product": product} for plus, minus, product in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_z(tmp_path) == pytest.approx({"plus": 1.3, "minus": 0.85, "product": 1.05})
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]) + "\n")
    assert run_z(tmp_path) == {}
