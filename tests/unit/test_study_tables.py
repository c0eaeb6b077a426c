"""The study's tables: numbers by hand."""

import json
from pathlib import Path
from typing import Any

from benchmarks.study_tables import tables


def interval(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def result(sampler: str, **more: Any) -> dict[str, Any]:
    figures = {"reward": interval(1.0, 0.5, 1.5), "kl": interval(2.0), "objective": interval(0.8, 0.7, 0.9)}
    costs = {"forwards": 480.0, "generated_tokens": 3840.4, "seconds": 61.6}
    return {"sampler": sampler, "advantage": None, "label_saving": None, **figures, **costs, **more}


def answers(reward: float, kl: float, neural: float) -> dict[str, list[float]]:
    return {"rewards": [reward - 1, reward + 1], "kls": [kl, kl], "neural": [neural, neural]}


def test_means_and_paired_differences(tmp_path: Path) -> None:
    finals = {
        ("vanilla", 0): (1.0, 4.0, 0.2),
        ("vanilla", 1): (2.0, 6.0, 0.4),
        ("pilaf", 0): (1.5, 3.0, 0.3),
        ("pilaf", 1): (2.5, 5.0, 0.5),
    }
    told = {
        "settings": {"baseline": "vanilla", "beta": 0.5, "missing": ["pilaf-seed2"]},
        "results": [
            result("vanilla"),
            result("pilaf", advantage=interval(0.1, -0.1, 0.3), label_saving=interval(0.25, None, 0.6)),
        ],
        "curves": [
            {
                "sampler": sampler,
                "seed": seed,
                "rewards": [0.0, reward],
                "kls": [0.0, 2 * (reward - objective)],
                "objectives": [0.0, objective],
            }
            for ((sampler, seed), (reward, _, _)), objective in zip(finals.items(), (-1.0, -1.0, 0.0, 1.0), strict=True)
        ],
        "final": {
            f"{sampler}-seed{seed}": {"policy": answers(*figures), "reference": answers(0.5, 0.0, 0.1)}
            for (sampler, seed), figures in finals.items()
        },
        "z": {
            f"{sampler}-seed{seed}": {"plus": 1.2, "minus": 0.9, "product": 1.1 + 0.1 * seed}
            if sampler == "pilaf"
            else {}
            for sampler, seed in finals
        },
        "pairs": {
            f"{sampler}-seed{seed}": {"all": worth(1.0 + seed), "on_policy": worth(1.0)} | also
            for sampler, seed in finals
            for also in [{"interpolated": worth(2.0 + seed)} if sampler == "pilaf" else {}]
        },
    }
    file = tmp_path / "online.json"
    file.write_text(json.dumps(told))
    text = tables([file, tmp_path / "absent.json"])
    assert "### online" in text and "Not finished: pilaf-seed2." in text
    course, final, labels, *branches, spread = [line for line in text.splitlines() if line.startswith("| pilaf")]
    assert cells(course)[:3] == ["pilaf", "1.000 [0.500, 1.500]", "2.000"]
    assert cells(course)[5:] == ["25 % [never, 60 %]", "480", "3840", "62"]
    # J: vanilla 1 − 0.5·4 = −1 and 2 − 0.5·6 = −1; pilaf 1.5 − 1.5 = 0 and 2.5 − 2.5 = 0: better by 1 at both seeds.
    means = [cell.split(" ")[0] for cell in cells(final)]
    assert means == ["pilaf", "2.000", "4.000", "0.000", "0.400", "1.000", "0.100"]
    assert "| the reference | 0.500 | 0.000 | 0.500 | 0.100 | | |" in text
    assert [cell.split(" ")[0] for cell in cells(labels)] == ["pilaf", "1.500", "5.0", "0.150", "80", "1.150"]
    assert (
        "| vanilla | 1.500" in text
        and cells(next(line for line in text.splitlines() if "| vanilla | 1.500" in line))[-1] == "–"
    )
    assert [cells(line)[0] for line in branches] == ["pilaf, on_policy", "pilaf, interpolated"]
    # In training, J of vanilla −1 and −1, of pilaf 0 and 1: differences 1 and 2, mean 1.5, deviation 0.707.
    # Student's t·0.707/√n is below 1.5 from n = 4 on: 4.303·0.408 = 1.757 for 3 seeds, 3.182·0.354 = 1.125 for 4.
    # R 1, 2 and 1.5, 2.5; KL 4, 6 and 3, 3: R is ½ more at both seeds, KL 1 and 3 less.
    assert [cell.split(" ")[0] for cell in cells(spread)] == ["pilaf", "0.500", "-2.000", "0.71", "0.71", "4"]
    assert "| vanilla | – | – | 0.00 | – | – |" in text
    assert cells(branches[1])[1].startswith("2.500 [") and "vanilla, on_policy" not in text


def worth(gap: float) -> dict[str, float]:
    return {"pairs": 10, "gap": gap, "ties": 0.05, "bits": gap / 10, "agreement": 0.8}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
