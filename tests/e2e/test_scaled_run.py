"""A run that is given more and fewer generators while it goes on: real Ray, real vLLM."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.store.reading import LedgerReader

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
COMMAND = [sys.executable, "-c", "from pilaf_ray.cli import main; main()"]


def read(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.long
def test_generators_come_and_go_and_the_books_add_up(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model", seed=0)
    folder = tmp_path / "elastic"
    overrides = [f"run.folder={tmp_path}", "run.name=elastic", f"model.policy={tmp_path / 'model'}"]
    process = subprocess.Popen(
        [*COMMAND, "train", str(TINY), *overrides, "run.max_steps=100000", "evaluation.prompts=2"],
        start_new_session=True,
    )

    def until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)  # polling another process, not ordering work

    def events(name: str) -> list[dict[str, Any]]:
        return [event for event in read(folder / "events.jsonl") if event["event"] == name]

    def steps() -> int:
        return len(read(folder / "metrics.jsonl"))

    try:
        until(lambda: steps() >= 2)
        for number, count in enumerate((2, 1)):
            subprocess.run([*COMMAND, "scale", str(folder), f"generators={count}"], check=True)
            until(lambda number=number: len(events("scaled")) > number)
            done = steps()
            until(lambda done=done: steps() >= done + 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert [(event["asked"], event["generators"]) for event in events("scaled")] == [(2, 2), (1, 1)]
    assert [event["replica"] for event in (*events("replica added"), *events("replica removed"))] == [1, 1]
    assert events("replica lost") == []
    assert max(line["age/max"] for line in read(folder / "metrics.jsonl")) <= 1
    reader = LedgerReader(f"sqlite:///{folder / 'preferences.db'}")
    assert reader.counts().check().labels >= 4 * steps()
    reader.close()
