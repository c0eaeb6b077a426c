"""What makes a run over nodes a failure."""

import json
from pathlib import Path
from typing import Any

import pytest
from console_run import make_run
from fastapi.testclient import TestClient

from benchmarks.chaos_books import Books
from benchmarks.nodes import CONSOLE_TITLE, exit_code, titles
from pilaf_ray.console.app import create_app

RIGHT = Books(steps=10, trained=40)


@pytest.mark.parametrize(
    ("told", "books", "code"),
    [
        ({"exit_code": 0}, RIGHT, 0),
        ({"exit_code": 0, "console_from_another_node": [CONSOLE_TITLE]}, RIGHT, 0),
        ({"exit_code": 0, "console_from_another_node": []}, RIGHT, 1),
        ({"exit_code": 0, "console_from_another_node": ["502 Bad Gateway"]}, RIGHT, 1),
        ({"exit_code": 3, "console_from_another_node": [CONSOLE_TITLE]}, RIGHT, 1),
        ({"exit_code": 0}, Books(steps=9, trained=36), 1),
        ({"exit_code": 0}, Books(steps=10, trained=40, labels_lost=["pair-7"]), 1),
    ],
)
def test_the_exit_code(told: dict[str, Any], books: Books, code: int) -> None:
    assert exit_code(told, books, steps=10) == code


def test_the_title_is_that_of_a_consoles_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "nodes")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "run": {"name": "nodes"}}))
    with TestClient(create_app(run), base_url="http://127.0.0.1") as client:
        assert titles(client.get("/enter").text) == [CONSOLE_TITLE]
    assert titles("") == []
