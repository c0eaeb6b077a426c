"""``pilaf-ray submit`` to a real local head: refused, run, stopped, and continued."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pilaf_ray.actors.jobs import CONFIG_VARIABLE
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.restarts import CHILD

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**values: str) -> dict[str, str]:
    # The stop of a job waits for the step under way; three seconds, Ray's default, would not do.
    ours = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, **ours, "PYTHONPATH": str(ROOT), "PATH": path, **values}


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Where a head of this module's own is reached."""

    dashboard: str
    address: str


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    port, dashboard = free_port(), free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--include-dashboard=true", f"--dashboard-port={dashboard}", "--num-cpus=2", "--disable-usage-stats"]
    command += ["--ray-client-server-port=" + str(free_port()), "--dashboard-agent-listen-port=" + str(free_port())]
    log = folder / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        # The dashboard answers before the head has a node; on a busy machine some have none in time, and end.
        wait_for(lambda: process.poll() or "Ray runtime started" in log.read_text(), seconds=180)
        assert process.poll() is None, log.read_text()
        wait_for(lambda: pilaf("jobs", "--address", url, cwd=folder).returncode == 0, seconds=90)
        yield Head(dashboard=url, address=f"127.0.0.1:{port}")
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the head and what it started, which is a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def pilaf(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pilaf_ray", *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


def wait_for(condition: object, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.5)


def steps(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


# Of the folder that is submitted and of nothing that is installed; it tells where it was imported from.
HOUSE_RULES = """
from pathlib import Path


def score(prompts, responses):
    Path({seen!r}).write_text(__file__)
    return [float(len(response)) for response in responses]
"""


def controller_of(run: Path) -> psutil.Process:
    """The controller of a job, below the process that starts it again."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            values = process.environ()
            if CHILD in values and f'"{run.parent}"' in values.get(CONFIG_VARIABLE, "") and "-c" in process.cmdline():
                return process
    raise AssertionError(f"no controller of {run}")


def test_a_dry_run_asks_the_cluster_and_leaves_nothing_there(head: Head, tmp_path: Path) -> None:
    policy = make_tiny_llama(tmp_path / "policy", seed=0)
    config = [str(ROOT / "configs/tiny.yaml"), f"model.policy={policy}", "--dry-run"]
    target = ("--to", "ray", "--address", head.dashboard)
    fits = pilaf("submit", *config, *target, cwd=tmp_path)
    assert (fits.returncode, fits.stderr) == (0, "")
    placement, command = fits.stdout.splitlines()
    for role in ("generator-0", "learner-0", "reference-0", "oracle-0"):
        assert role in placement
    assert command.startswith("python -m pilaf_ray train")

    joined = pilaf("train", *config, "learner.ranks=9", f"resources.address={head.address}", cwd=tmp_path)
    assert joined.returncode == 2 and "error: learner needs 9 x 1 CPU; beside the other roles" in joined.stderr
    # By the dashboard a node is its address, by the cluster its host.
    node = placement.rpartition("/")[2].partition(":")[0]
    assert f"/{node}: generator-0, reference-0, oracle-0\n" in joined.stdout, joined.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


@pytest.mark.timeout(1800)
def test_a_run_is_refused_submitted_stopped_and_continued(head: Head, tmp_path: Path) -> None:
    policy = make_tiny_llama(tmp_path / "policy", seed=0)
    rules, seen = tmp_path / "house_rules.py", tmp_path / "seen"
    rules.write_text(HOUSE_RULES.format(seen=str(seen)))
    config = [str(ROOT / "configs/tiny.yaml"), f"model.policy={policy}", "run.name=sent", "evaluation.prompts=2"]
    config += ["oracle.target=house_rules:score", "run.restarts=1", "checkpoint.every_steps=1"]
    target = ("--to", "ray", "--address", head.dashboard)

    refused = pilaf("submit", *config, "learner.ranks=9", *target, cwd=tmp_path)
    assert refused.returncode == 2
    assert "error: learner needs 9 x 1 CPU; beside the other roles" in refused.stderr
    assert not (tmp_path / "runs").exists()

    sent = pilaf("submit", *config, "run.max_steps=5000", *target, cwd=tmp_path)
    assert sent.stdout.startswith("submitted pilaf-sent-1; run folder"), sent.stderr
    kept = rules.rename(tmp_path / "elsewhere.py")
    run = tmp_path / "runs" / "sent"
    wait_for(lambda: len(steps(run)) >= 2, seconds=400)
    assert not (tmp_path / "runs" / ".submitted").exists(), "the configuration travels with the job"
    origin = Path(seen.read_text())
    assert origin.name == "house_rules.py" and not origin.is_relative_to(tmp_path), "the working folder travels"

    controller_of(run).kill()
    wait_for(lambda: '"controller lost"' in (run / "events.jsonl").read_text(), seconds=60)
    before = steps(run)[-1]
    wait_for(lambda: steps(run)[-1] > before, seconds=400)
    assert pilaf("stop", "pilaf-sent-1", *target, cwd=tmp_path).returncode == 0
    wait_for(lambda: "STOPPED" in pilaf("jobs", *target, cwd=tmp_path).stdout, seconds=120)
    done = steps(run)[-1]
    assert (run / "checkpoints" / "latest").exists()

    kept.rename(rules)
    again = pilaf("submit", *config, f"run.max_steps={done + 2}", *target, "--follow", cwd=tmp_path)
    assert again.returncode == 0, again.stderr + again.stdout
    assert "submitted pilaf-sent-2" in again.stdout
    assert f"step {done + 2}/{done + 2}" in again.stdout
    assert steps(run) == list(range(1, done + 3))
    logs = pilaf("logs", "pilaf-sent-1", *target, cwd=tmp_path).stdout
    assert "stopping: the step under way is finished and saved" in logs
    unknown = pilaf("logs", "nothing", *target, cwd=tmp_path)
    assert unknown.returncode == 2 and "there is no job 'nothing'" in unknown.stderr


def test_a_head_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    done = pilaf("jobs", "--address", f"http://127.0.0.1:{free_port()}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Ray job server answers at http://127.0.0.1:")
