"""``pilaf-ray submit --to slurm`` on a real Slurm: refused, queued, run, preempted, requeued, stopped, continued.

``pytest --long tests/e2e/test_slurm_run.py -s`` prints how long each part took.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_machine import GRACE_SECONDS, SlurmMachine, slurm_machine, why_not

from benchmarks.chaos_books import Books, read_books
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.store.reading import LedgerReader

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
ROOT = Path(__file__).parents[2]
TO_SLURM = ("--to", "slurm")


@pytest.fixture(scope="module")
def machine() -> Iterator[SlurmMachine]:
    with slurm_machine() as running:
        yield running


def words(folder: Path, name: str, *overrides: str) -> list[str]:
    nodes = f"resources.nodes=[{{count: 1, cpus: {os.cpu_count()}, memory_gib: 2}}]"
    ours = [f"run.name={name}", f"run.folder={folder / 'runs'}", nodes, "submission.slurm.partition=low"]
    return [str(ROOT / "configs" / "tiny.yaml"), *ours, *overrides]


def submitted(machine: SlurmMachine, folder: Path, *config: str) -> str:
    done = machine.pilaf("submit", *config, *TO_SLURM, cwd=folder)
    assert done.stdout.startswith("submitted "), done.stderr
    return done.stdout.split()[1].rstrip(";")


def until(condition: Callable[[], object], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)  # polling other processes, not ordering work


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run's folder, seen from outside."""

    path: Path

    def lines(self, name: str) -> list[dict[str, Any]]:
        file = self.path / name
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines("metrics.jsonl")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.lines("events.jsonl") if event["event"] == name]


def require_whole_books(run: Run, *, steps: int) -> None:
    """No step is missing or there twice, no pair has two labels, and the ledger's counts add up."""
    assert read_books(run, batch_pairs=4) == Books(steps=steps, trained=4 * steps)
    reader = LedgerReader(f"sqlite:///{run.path / 'preferences.db'}")
    assert reader.counts().check().labels >= 4 * steps
    reader.close()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("submission.slurm.partition=nowhere", "invalid partition specified: nowhere"),
        ("resources.nodes=[{count: 3, cpus: 1, memory_gib: 2}]", "node configuration is not available"),
        ("resources.nodes=[{count: 1, cpus: 999, memory_gib: 2}]", "node configuration is not available"),
        ("resources.nodes=[{count: 1, cpus: 2, memory_gib: 99999}]", "node configuration is not available"),
    ],
)
def test_what_no_node_could_run_is_one_line_and_not_queued(
    machine: SlurmMachine, tmp_path: Path, override: str, complaint: str
) -> None:
    policy = make_tiny_llama(tmp_path / "policy", seed=0)
    config = words(tmp_path, "refused", f"model.policy={policy}", override)
    done = machine.pilaf("submit", *config, *TO_SLURM, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    # The estimates of memory may have said before that these nodes are small.
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: node-")]
    assert error.startswith("error: sbatch ") and complaint in error
    assert "pilaf-refused" not in machine.pilaf("jobs", *TO_SLURM, cwd=tmp_path).stdout


def test_a_slurm_that_is_out_of_reach_is_one_line(machine: SlurmMachine, tmp_path: Path) -> None:
    nowhere = machine.pilaf("jobs", *TO_SLURM, cwd=tmp_path, SLURM_CONF=str(tmp_path / "none"), PATH="/usr/sbin")
    assert (nowhere.returncode, nowhere.stderr[:30]) == (2, "error: there is no 'squeue' on")
    conf = (machine.folder / "slurm.conf").read_text().replace("SlurmctldPort=", "SlurmctldPort=1\n#")
    (tmp_path / "slurm.conf").write_text(conf + "MessageTimeout=2\n")
    silent = machine.pilaf("jobs", *TO_SLURM, cwd=tmp_path, SLURM_CONF=str(tmp_path / "slurm.conf"))
    assert (silent.returncode, silent.stderr) == (
        2,
        "error: Slurm's controller does not answer; `scontrol ping` says whether it is up\n",
    )
    unknown = machine.pilaf("stop", "4711", *TO_SLURM, cwd=tmp_path)
    assert unknown.returncode == 2 and "Invalid job id specified" in unknown.stderr


def test_a_job_that_waits_leaves_the_queue_when_it_is_stopped(machine: SlurmMachine, tmp_path: Path) -> None:
    blocker = machine.ask(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"
    )
    until(lambda: machine.job(blocker).state == "RUNNING", seconds=30)
    job = submitted(machine, tmp_path, *words(tmp_path, "waits"))
    assert machine.job(job).state == "PENDING"
    early = machine.pilaf("logs", job, *TO_SLURM, cwd=tmp_path)
    assert early.returncode == 2 and "has no output yet" in early.stderr
    assert machine.pilaf("stop", job, *TO_SLURM, cwd=tmp_path).returncode == 0
    assert machine.job(job).state == "CANCELLED"
    assert f"{job}\tCANCELLED" in machine.pilaf("jobs", *TO_SLURM, cwd=tmp_path).stdout
    machine.ask("scancel", blocker)


STAND_INS = {
    # The driver: says that it has saved when it is told to end.
    "python": """
case "$1" in
  -c) printf token;;
  *) echo started; trap 'echo saved; kill $!; exit 0' TERM; sleep 600 & wait; echo "ended early";;
esac
""",
    "ray": '[ "$1" = health-check ] || exec sleep 600\n',
}


def submit_stand_in(machine: SlurmMachine, folder: Path, name: str) -> tuple[str, Path]:
    """The job's script with nothing but shell in Ray's and the driver's place; its id and its output, once it runs."""
    for program, text in STAND_INS.items():
        (folder / program).write_text(f"#!/bin/sh\n{text}")
        (folder / program).chmod(0o755)
    setup = f'submission.slurm.setup="PATH={folder}:$PATH"'
    job = submitted(machine, folder, *words(folder, name, setup))
    output = folder / "runs" / ".submitted" / f"pilaf-{name}-{job}.out"
    until(lambda: output.exists() and "started" in output.read_text(), seconds=60)
    return job, output


def preempt(machine: SlurmMachine, job: str) -> float:
    """Let a job of partition ``high`` take the node; the seconds until it has it, and ``job`` is in the queue again."""
    asked = time.monotonic()
    urgent = machine.ask(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    until(lambda: machine.job(urgent).state in ("RUNNING", "COMPLETED"), seconds=GRACE_SECONDS + 30)
    seconds = time.monotonic() - asked
    until(lambda: machine.job(job).state == "PENDING", seconds=30)
    # Slurm lets a requeued job wait for two minutes; a test need not.
    machine.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    return seconds


def test_only_a_preempted_job_returns_and_it_is_told_to_save(machine: SlurmMachine, tmp_path: Path) -> None:
    job, output = submit_stand_in(machine, tmp_path, "preempted")
    assert preempt(machine, job) < GRACE_SECONDS
    until(lambda: output.read_text().count("started") == 2, seconds=90)
    assert (output.read_text().count("saved"), machine.job(job).restarts) == (1, 1)
    assert "interrupted by Slurm: back into the queue" in output.read_text()

    assert machine.pilaf("stop", job, *TO_SLURM, cwd=tmp_path).returncode == 0
    until(lambda: machine.job(job).state == "COMPLETED", seconds=30)
    assert (output.read_text().count("saved"), machine.job(job).restarts) == (2, 1)

    job, output = submit_stand_in(machine, tmp_path, "cancelled")
    machine.ask("scancel", job)
    until(lambda: machine.job(job).state == "CANCELLED", seconds=30)
    assert machine.job(job).restarts == 0
    assert "back into the queue" not in output.read_text()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_is_preempted_requeued_and_goes_on_to_its_end(machine: SlurmMachine, tmp_path: Path) -> None:
    steps, policy = 30, make_tiny_llama(tmp_path / "policy", seed=0)
    run = Run(path=tmp_path / "runs" / "preempted")
    config = words(tmp_path, "preempted", f"model.policy={policy}", "evaluation.prompts=2", f"run.max_steps={steps}")
    job = submitted(machine, tmp_path, *config)
    until(lambda: len(run.steps()) >= 2, seconds=400)

    yielded = preempt(machine, job)
    assert yielded < GRACE_SECONDS, "Slurm ended the job, which had not given its node back"
    saved = run.steps()[-1]
    assert saved < steps, "the run ended before it was preempted"
    assert (run.path / "checkpoints" / "latest").exists()
    assert machine.job(job).restarts == 1

    followed = machine.pilaf("logs", job, *TO_SLURM, "--follow", cwd=tmp_path)
    assert followed.returncode == 0, followed.stderr
    assert machine.job(job).state == "COMPLETED" and machine.job(job).restarts == 1
    for line in ("stopping: the step under way is finished and saved", "interrupted by Slurm: back into the queue"):
        assert followed.stdout.count(line) == 1
    assert f"step {steps}/{steps}" in followed.stdout
    assert [event["attempt"] for event in run.events("run started")] == [1, 2]
    assert run.steps() == list(range(1, steps + 1))
    require_whole_books(run, steps=steps)
    print(f"\npreempted after step {saved}; the node was free after {yielded:.1f} s of {GRACE_SECONDS}")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_is_stopped_and_submitted_again(machine: SlurmMachine, tmp_path: Path) -> None:
    policy = make_tiny_llama(tmp_path / "policy", seed=0)
    run = Run(path=tmp_path / "runs" / "stopped")
    config = words(tmp_path, "stopped", f"model.policy={policy}", "evaluation.prompts=2")
    first = submitted(machine, tmp_path, *config, "run.max_steps=5000")
    until(lambda: len(run.steps()) >= 2, seconds=400)
    assert f"{first}\tRUNNING\tpilaf-stopped" in machine.pilaf("jobs", *TO_SLURM, cwd=tmp_path).stdout
    assert machine.pilaf("stop", first, *TO_SLURM, cwd=tmp_path).returncode == 0
    until(lambda: machine.job(first).state == "COMPLETED", seconds=GRACE_SECONDS)
    assert machine.job(first).restarts == 0
    done = run.steps()[-1]

    again = machine.pilaf("submit", *config, f"run.max_steps={done + 2}", *TO_SLURM, "--follow", cwd=tmp_path)
    assert again.returncode == 0, again.stderr + again.stdout
    assert f"step {done + 2}/{done + 2}" in again.stdout
    require_whole_books(run, steps=done + 2)
