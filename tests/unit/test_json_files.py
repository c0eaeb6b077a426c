"""What results are written as: JSON that readers other than Python's take, and what they were made with."""

import json
import math
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from pilaf_ray.evaluation.alignment import Alignment
from pilaf_ray.evaluation.json_files import defined, write_json
from pilaf_ray.evaluation.measures import ImplicitReward, PolicyMeasures
from pilaf_ray.evaluation.statistics import Interval
from pilaf_ray.evaluation_run import Evaluation
from pilaf_ray.provenance import commit, made_with

NOWHERE = Interval(0.5, math.nan, math.nan)


def strictly(path: Path) -> object:
    """Read as the standard says: NaN and Infinity are no JSON."""

    def refuse(word: str) -> object:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_is_not_defined_is_null_at_any_depth(tmp_path: Path) -> None:
    write_json({"a": [1.0, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": 3}, tmp_path / "new" / "x.json")
    assert strictly(tmp_path / "new" / "x.json") == {"a": [1.0, None, [None, {"b": None}]], "c": "NaN", "d": 3}


def test_an_evaluation_with_undefined_limits_is_json(tmp_path: Path) -> None:
    measures = PolicyMeasures(
        **dict.fromkeys(
            ("reward", "kl", "kl_low_variance", "objective", "length", "distinct_1", "distinct_2"), NOWHERE
        ),
        corpus_distinct_2=1.0,
        implicit_reward=ImplicitReward(accuracy=NOWHERE, calibration_error=NOWHERE),
    )
    found = Evaluation(policies={"p": measures}, win_rates={"p": {"q": NOWHERE, "r": None}}, results={}, settings={})
    write_json(found.as_json(), tmp_path / "evaluation.json")
    told = strictly(tmp_path / "evaluation.json")
    assert isinstance(told, dict)
    assert told["win_rates"]["p"] == {"q": {"value": 0.5, "low": None, "high": None}, "r": None}
    assert told["policies"]["p"]["implicit_reward"]["accuracy"]["low"] is None
    assert set(told["made_with"]) == {"commit", "versions", "machine"}


def test_an_alignment_without_a_norm_is_json() -> None:
    lost = Interval(math.nan, math.nan, math.nan)
    result = Alignment(sampler="pilaf", samples=4, cosine=lost, residual=lost, plain_cosine=Interval(0.5, 0.25, 0.75))
    told = defined(asdict(result))
    assert told["cosine"] == {"value": None, "low": None, "high": None}
    assert told["plain_cosine"] == {"value": 0.5, "low": 0.25, "high": 0.75}


def test_results_say_what_they_were_made_with(tmp_path: Path) -> None:
    told = made_with()
    assert told["machine"]["cores"] >= 1
    assert {"python", "torch", "vllm", "transformers", "pilaf_ray"} <= set(told["versions"])
    assert commit(tmp_path) is None, "no checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = commit(tmp_path)
    assert clean is not None and not clean.endswith("-dirty")
    inside = tmp_path / "lib" / "site-packages"
    inside.mkdir(parents=True)
    assert commit(inside) is None, "a checkout around an installed package is another project's"


@pytest.mark.parametrize(("line", "name"), [("model name\t: Some CPU @ 2 GHz\n", "Some CPU @ 2 GHz"), ("x: y\n", "")])
def test_the_processors_name_is_the_kernels(line: str, name: str, tmp_path: Path) -> None:
    from pilaf_ray.engines.device import cpu_name

    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}flags\t\t: avx2\n")
    assert cpu_name(tmp_path / "cpuinfo") == name
    assert cpu_name(tmp_path / "none") == ""
