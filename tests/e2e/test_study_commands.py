"""`pilaf-ray align` and `pilaf-ray compare` on tiny random models with real engines."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from console_browser import CHROMIUM, FLAGS

from pilaf_ray.alignment_run import measure_alignment, table
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.errors import ConfigError
from pilaf_ray.evaluation.json_files import write_json

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SIZES = (("screen", 1280, 900), ("screen", 375, 812), ("print", 718, 1046))
"""A desktop, a phone and A4 paper within its margins, in CSS pixels."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=0)


@pytest.mark.long
def test_alignment_where_policy_and_reference_are_the_same_model(model: Path, tmp_path: Path) -> None:
    """Then π⁺ = π⁻ = π and Z⁺ = Z⁻ = 1, so the Z-weighted loss is the fair coin's (docs/algorithms.md)."""
    own = [f"model.policy={model}"]
    samplers = ["vanilla", "pilaf", "t_pilaf"]
    found = measure_alignment(model, samplers=samplers, prompts=4, samples=8, config=TINY, overrides=own)
    assert found["z_product"] == pytest.approx(1.0, abs=1e-3)
    rows = {(row["sampler"], row["samples"]): row for row in found["results"]}
    assert set(rows) == {(sampler, size) for sampler in samplers for size in (4, 8)}
    for size in (4, 8):
        for measure in ("cosine", "residual", "plain_cosine"):
            fair, weighted = rows["pilaf", size][measure], rows["t_pilaf", size][measure]
            assert weighted["value"] == pytest.approx(fair["value"], abs=1e-3, nan_ok=True)
    for row in rows.values():
        assert -1 <= row["plain_cosine"]["low"] <= row["plain_cosine"]["value"] <= row["plain_cosine"]["high"] <= 1
        residual = row["residual"]["value"]
        assert math.isnan(residual) or 0 <= residual <= 1
    # ∇J and vanilla's ∇L are made of the same responses of π, which pull in the same direction.
    assert rows["vanilla", 8]["plain_cosine"]["value"] > 0.5
    assert found["gradient"]["parameters"] == r"^model\.layers\.1\." and found["gradient"]["count"] > 10_000
    assert table(found).row_count == 6
    write_json(found, tmp_path / "alignment.json")
    told = json.loads((tmp_path / "alignment.json").read_text(), parse_constant=pytest.fail)
    assert told["made_with"]["versions"]["vllm"] != "missing"


def test_what_cannot_be_aligned_is_one_clear_line(model: Path) -> None:
    own = [f"model.policy={model}"]
    with pytest.raises(ConfigError, match="'best_of_n' has no fixed mixture"):
        measure_alignment(model, samplers=["best_of_n"], prompts=2, samples=4, config=TINY, overrides=own)
    with pytest.raises(ConfigError, match="give 4 or more"):
        measure_alignment(model, samplers=["pilaf"], prompts=2, samples=2, config=TINY, overrides=own)
    with pytest.raises(ConfigError, match="--prompts 5000"):
        measure_alignment(model, samplers=["pilaf"], prompts=5000, samples=4, config=TINY, overrides=own)
    with pytest.raises(ConfigError, match="belongs to no run"):
        measure_alignment(model, samplers=["pilaf"], prompts=2, samples=4)


def compare(model: Path, output: Path) -> str:
    command = [sys.executable, "-m", "pilaf_ray", "compare", str(TINY), f"model.policy={model}"]
    command += ["--samplers", "vanilla,pilaf", "--seeds", "0,1", "--budget", "labels=16", "--output", str(output)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_comparison_runs_what_is_missing_and_reports_all_runs(model: Path, tmp_path: Path) -> None:
    names = [f"{sampler}-seed{seed}" for seed in (0, 1) for sampler in ("vanilla", "pilaf")]
    said = compare(model, tmp_path)
    assert [line for line in said.splitlines() if "running" in line] == [f"{name}: running" for name in names]
    kept = {name: (tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in names}
    first = json.loads((tmp_path / "comparison.json").read_text())
    said = compare(model, tmp_path)
    assert [line for line in said.splitlines() if "seed" in line] == [f"{name}: finished already" for name in names]
    assert kept == {name: (tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in names}
    told = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert told == first and told["settings"]["missing"] == []
    assert [(row["sampler"], row["seeds"], row["labels"]) for row in told["results"]] == [
        ("vanilla", [0, 1], 16.0),
        ("pilaf", [0, 1], 16.0),
    ]
    for curve in told["curves"]:
        run = tmp_path / "runs" / f"{curve['sampler']}-seed{curve['seed']}"
        evaluated = sorted((run / "evaluations").glob("step-*.json"))
        rewards = [json.loads(file.read_text())["rewards"] for file in evaluated]
        assert curve["rewards"] == pytest.approx([sum(values) / len(values) for values in rewards])
        # Every run starts from the same policy: same responses, seed by seed.
        assert curve["rewards"][0] == pytest.approx(
            next(c["rewards"][0] for c in told["curves"] if c["seed"] == curve["seed"])
        )
    page = (tmp_path / "comparison.html").read_text()
    assert "Partial" not in page and "seeds 0, 1" in page
    if CHROMIUM is not None:
        look(tmp_path / "comparison.html")


def look(page_file: Path) -> None:
    """In a browser: nothing from a network, no error, and nothing wider than screen or paper but what scrolls."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for media, width, height in SIZES:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.emulate_media(media=media)
            asked, errors = list[str](), list[str]()
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(page_file.as_uri())
            assert asked == [page_file.as_uri()] and errors == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.locator("svg").count() == 7
            page.close()
        browser.close()
