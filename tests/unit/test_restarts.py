"""A controller that dies is started again by its parent, as often as allowed, and not when it should not be."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pilaf_ray.errors import GivenUpError
from pilaf_ray.observability.alerts import Alert
from pilaf_ray.pipeline.supervision import SupervisionPolicy
from pilaf_ray.restarts import run_restartable

_CONTROLLER = """
import json, os, signal, sys, time
from pathlib import Path
folder, resume = Path(sys.argv[1]), sys.argv[2]
(folder / "config.json").write_text("{}")
lives = folder / "lives"
life = len(lives.read_text()) if lives.exists() else 0
lives.write_text("x" * (life + 1))
with (folder / "starts").open("a") as starts:
    starts.write(resume + "\\n")
plan = json.loads((folder / "plan").read_text())
steps, end = plan[min(life, len(plan) - 1)]
with (folder / "metrics.jsonl").open("a") as metrics:
    metrics.write("{}\\n" * steps)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
    # Again and again: the parent may not know its child yet when the first one comes.
    while True:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.05)
sys.exit(end)
"""


def run(
    folder: Path, plan: list[tuple[int, int | str]], *, restarts: int, alerts: list[Alert] | None = None
) -> tuple[int, list[float]]:
    (folder / "plan").write_text(json.dumps(plan))
    pauses: list[float] = []

    def start(resume: bool) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", _CONTROLLER, str(folder), str(resume)])

    told = [] if alerts is None else alerts
    code = run_restartable(
        start, resume=False, folder=folder, restarts=restarts, policy=SupervisionPolicy(), sleep=pauses.append,
        tell=told.append,
    )  # fmt: skip
    return code, pauses


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().split()


def test_deaths_with_progress_between_them_are_not_in_a_row(tmp_path: Path) -> None:
    assert run(tmp_path, [(1, "kill"), (2, 3), (1, "kill"), (0, 0)], restarts=1) == (0, [0.0, 0.0, 0.0])
    assert starts(tmp_path) == ["False", "True", "True", "True"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["cause"], event["step"]) for event in events] == [
        ("killed by SIGKILL", 1),
        ("ended with exit code 3; see its log", 3),
        ("killed by SIGKILL", 4),
    ]


def test_too_many_in_a_row_tell_the_first_cause(tmp_path: Path) -> None:
    alerts: list[Alert] = []
    with pytest.raises(GivenUpError, match="the controller failed 3 times in a row; first: killed by SIGKILL"):
        run(tmp_path, [(0, "kill"), (0, 1)], restarts=2, alerts=alerts)
    assert len(starts(tmp_path)) == 3
    assert [(alert.event, alert.message[:41]) for alert in alerts] == [
        ("controller lost", "the controller was lost after step 0: kil"),
        ("given up", "the controller failed 3 times in a row; f"),
    ], "the second loss comes too soon after the first to be told"


def test_a_refused_configuration_is_not_tried_again(tmp_path: Path) -> None:
    assert run(tmp_path, [(0, 2)], restarts=5)[0] == 2
    assert len(starts(tmp_path)) == 1


def test_a_stop_is_passed_on_and_ends_it(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run(tmp_path, [(1, "wait")], restarts=5)[0] == 9
    assert len(starts(tmp_path)) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_request_to_stop_that_comes_between_two_controllers_is_heard(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text(json.dumps([(1, "kill"), (1, 0)]))

    def start(resume: bool) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", _CONTROLLER, str(tmp_path), str(resume)])

    code = run_restartable(
        start,
        resume=False,
        folder=tmp_path,
        restarts=3,
        policy=SupervisionPolicy(),
        sleep=lambda _seconds: signal.raise_signal(signal.SIGTERM),
    )
    assert code == -signal.SIGKILL
    assert starts(tmp_path) == ["False"], "nobody is started who was asked to stop"
