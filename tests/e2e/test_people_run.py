"""A whole run that a scripted person teaches through a browser, on random weights."""

import json
import socket
from pathlib import Path

import pytest
from console_browser import CHROMIUM, WHY_NOT

from benchmarks.people import Job, Person, books, label_all, labelling_page
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.oracle import FunctionOracleConfig, HumanOracleConfig
from pilaf_ray.data.tiny_models import make_tiny_llama

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_what_a_person_was_told_is_saved_is_trained_on_though_the_console_was_killed(tmp_path: Path) -> None:
    policy = make_tiny_llama(tmp_path / "policy", seed=0)
    words = [f"run.folder={tmp_path}", f"console.port={free_port()}", "oracle.undo_seconds=0.5", "run.max_steps=2"]
    words += [f"model.policy={policy}"]
    file = Path(__file__).parents[2] / "configs/people.yaml"
    config = load_config(file, words)
    assert isinstance(config.oracle, HumanOracleConfig) and isinstance(config.evaluation.oracle, FunctionOracleConfig)
    job = Job(file, words, config)
    try:
        job.wait_for_console()
        with labelling_page(job.invitation("ada")) as page:
            work = label_all(job, Person(page, config.oracle, config.evaluation.oracle), kill_after=3)
        assert job.process.wait(60) == 0, job.log.read_text()
    finally:
        job.end()
    found = books(job.folder, work)
    assert work.console_killed_after == 3
    assert found.saved == found.votes >= 8 and not found.saved_only and not found.ledger_only
    summary = json.loads((job.folder / "report" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["pairs"] == 8
