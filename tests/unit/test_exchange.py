"""Pairs out to other tools and labels back in; the terminal's screen; names for Prometheus."""

import json
import re
from pathlib import Path

import pytest
from console_run import CONFIG, make_run
from rich.console import Console
from typer.testing import CliRunner

from pilaf_ray.cli import app
from pilaf_ray.console.app import open_reader
from pilaf_ray.console.terminal import show
from pilaf_ray.errors import ConfigError
from pilaf_ray.exchange.importing import read_votes
from pilaf_ray.observability.exposed import FIXED, PREFIX, dashboard, exposed_name, exposed_names
from pilaf_ray.observability.metric_table import METRICS
from pilaf_ray.store.desk import LabelDesk
from pilaf_ray.store.inbox import put_votes
from pilaf_ray.store.ledger import PreferenceLedger

ROOT = Path(__file__).parents[2]
RUN = CliRunner()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "example")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_preferences_are_what_trl_reads(run: Path, tmp_path: Path, ending: str) -> None:
    from datasets import load_dataset
    from trl import maybe_extract_prompt

    output = tmp_path / f"pairs.{ending}"
    assert RUN.invoke(app, ["pairs", "export", str(run), "-o", str(output)]).output.startswith("7 pairs")
    kind = "json" if ending == "jsonl" else "parquet"
    loaded = load_dataset(kind, data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    row = maybe_extract_prompt(loaded[1])
    assert (row["prompt"], row["chosen"], row["rejected"]) == (
        "Write about topic 1 & more", "the same word 1", "the other word",
    )  # fmt: skip
    assert (row["pair_id"], row["branch"], row["trained_step"], row["chosen_probability"]) == (
        "pair-1", "interpolated", 1, 1.0,
    )  # fmt: skip
    assert "pair-5" not in loaded["pair_id"]  # a tie
    assert (row["reference_logprob_a"], row["label_source"], row["max_policy_version"]) == (-1.0, "function", 0)


def test_what_labelling_tools_are_given_comes_back_as_votes(run: Path, tmp_path: Path) -> None:
    for tool in ("argilla", "label-studio"):
        RUN.invoke(app, ["pairs", "export", str(run), "-o", str(tmp_path / f"{tool}.json"), "--to", tool])
    argilla = json.loads((tmp_path / "argilla.json").read_text())
    assert argilla[5]["suggestions"] == {"preference": {"value": "tie"}} and len(argilla) == 8
    answered = [{**argilla[2], "responses": {"preference": [{"value": "b", "user_id": "ada"}]}}, argilla[3]]
    (tmp_path / "back.json").write_text(json.dumps(answered))
    (vote,) = read_votes(tmp_path / "back.json", annotator="import")
    assert (vote.pair_id, vote.annotator, vote.probability) == ("pair-2", "ada", 0.0)
    tasks = json.loads((tmp_path / "label-studio.json").read_text())
    assert "<Choices" in (tmp_path / "label-studio.xml").read_text()
    result = {"from_name": "preference", "value": {"choices": ["tie"]}}
    tasks[4]["annotations"] = [{"completed_by": {"email": "ben@x"}, "result": [result]}]
    (tmp_path / "back.json").write_text(json.dumps(tasks))
    (vote,) = read_votes(tmp_path / "back.json", annotator="import")
    assert (vote.pair_id, vote.annotator, vote.probability) == ("pair-4", "ben@x", 0.5)


def test_bad_label_files_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"pair_id": "x", "preference": "c"}\n')
    with pytest.raises(ConfigError, match="row 1: preference is 'c'"):
        read_votes(file, annotator="x")
    file.write_text('{"pair_id": "x", "probability": 2}\n')
    with pytest.raises(ConfigError, match="row 1 needs preference"):
        read_votes(file, annotator="x")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_votes(tmp_path / "none.jsonl", annotator="x")


def test_imported_labels_flow_into_a_ledger_once(run: Path, tmp_path: Path) -> None:
    from console_run import ledger_pair

    (run / "config.json").write_text(json.dumps({**CONFIG, "oracle": {"type": "human"}}))
    rows = [{"pair_id": f"pair-{n}", "preference": "a"} for n in (3, 8, 77)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        result = RUN.invoke(app, ["pairs", "import", str(run), str(tmp_path / "labels.jsonl"), "--annotator", "crowd"])
        assert result.output.startswith("3 labels")
    ledger = PreferenceLedger(f"sqlite:///{run / 'preferences.db'}")
    waiting = ledger_pair(8, a="x", b="y")
    ledger.add_plans([waiting.plan])
    ledger.add_responses([waiting])
    desk = LabelDesk(ledger, inbox=run / "inbox")
    known = desk.want(["pair-8"], 1)
    assert [(vote.annotator, vote.probability) for vote in known["pair-8"].votes] == [("crowd", 1.0)]
    assert [event.late for event in desk.history()] == [True, False]
    assert list((run / "inbox").glob("*.jsonl")) == []
    put_votes(run, read_votes(tmp_path / "labels.jsonl", annotator="crowd"))
    desk.want(["pair-8"], 1)
    assert len(desk.history()) == 2
    ledger.close()


def test_a_run_that_asks_nobody_takes_no_labels(run: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text("")
    result = RUN.invoke(app, ["pairs", "import", str(run), str(tmp_path / "labels.jsonl")])
    assert "asks nobody" in str(result.exception)


def test_the_terminal_shows_the_same_figures(run: Path) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(run, once=True, console=console)
    text = console.export_text()
    assert "step 4 of 100" in text and "labels 8 of 200" in text and "labeled 4   trained 4" in text
    assert "reward 2.500" in text and "J 2.000" in text and "generator 75 % (3)" in text
    assert "<b>killed</b>" in text


def test_every_query_of_the_dashboard_names_what_is_exposed() -> None:
    written = json.loads((ROOT / "launch" / "grafana" / "dashboards" / "pilaf.json").read_text())
    assert written == dashboard()
    queries = [target["expr"] for panel in written["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(rf"{PREFIX}(pilaf_\w+)", query)}
    assert named == set(exposed_names()) and len(exposed_names()) == len(METRICS) + len(FIXED)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in exposed_names())
    assert all(text.isascii() for text in exposed_names().values())
    assert exposed_name("z/plus") == "pilaf_z_plus"


def test_readers_of_a_stopped_run_leave_it_alone(run: Path) -> None:
    reader = open_reader(run, CONFIG)
    assert reader.counts()["trained"] == 4
    reader.close()
