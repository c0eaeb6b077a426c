"""The task that SkyPilot is given: read by its parser, run by a shell, and refused where its results would be lost."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from submission_example import ROOT, FakeClient, example

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ClusterError, ConfigError
from pilaf_ray.submission.job import check, render
from pilaf_ray.submission.schedulers import SkyPilot

NAME = "pilaf-llama3-8b-hh"

READ_BY_SKYPILOT = """
import json, sys, sky
task = sky.Task.from_yaml_config(sky.utils.yaml_utils.safe_load(sys.stdin))
(asked,) = task.resources
mounts = {place: (store.source, store.mode.value) for place, store in task.storage_mounts.items()}
print(json.dumps([task.name, task.num_nodes, asked.accelerators, asked.cpus, asked.memory, asked.use_spot,
                  str(asked.cloud), asked.region, mounts, task.workdir]))
"""


@pytest.mark.skipif("SKYPILOT_PYTHON" not in os.environ, reason="SKYPILOT_PYTHON names no Python that has skypilot")
def test_skypilot_reads_what_was_meant(tmp_path: Path) -> None:
    def read(text: str) -> subprocess.CompletedProcess[str]:
        # SkyPilot pins packages against ours, so it lives in an environment of its own, with a home of its own.
        command = [os.environ["SKYPILOT_PYTHON"], "-c", READ_BY_SKYPILOT]
        alone = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        return subprocess.run(command, input=text, env=alone, capture_output=True, text=True, check=False)

    folder = "/shared/pilaf_ray"
    plain = read((ROOT / "launch" / "skypilot.yaml").read_text())
    gpus = {"H100": 8}
    assert plain.returncode == 0, plain.stderr
    mounts = {"/shared/runs": ["s3://my-bucket", "MOUNT_CACHED"]}
    assert json.loads(plain.stdout) == [NAME, 1, gpus, "96+", "900+", False, "None", None, mounts, folder]
    where = "submission.sky={accelerators: 'H100:8', cloud: aws/us-east-1, bucket: 's3://bucket', use_spot: true}"
    (text,) = render(example(where, "submission.secrets=[KEY]", target="skypilot"), "skypilot").values()
    full = read(text)
    assert full.returncode == 0, full.stderr
    mounts = {"/shared/runs": ["s3://bucket", "MOUNT_CACHED"]}
    assert json.loads(full.stdout) == [NAME, 1, gpus, "96+", "900+", True, "AWS", "us-east-1", mounts, folder]
    assert read(text.replace("num_nodes:", "num_noeds:")).returncode != 0


def test_gpus_of_skypilot_are_those_of_the_plan() -> None:
    for named, gpus in (("null", 8), ("'H100:4'", 8), ("H100", 8), ("'H100:8'", 0)):
        # Nothing else of the plan is looked at before.
        nodes = f"resources.nodes=[{{count: 1, gpus: {gpus}, cpus: 96, memory_gib: 900}}]"
        with pytest.raises(ConfigError, match=rf"but resources\.nodes has {gpus} GPUs a node: name that many"):
            check(example(f"submission.sky.accelerators={named}", nodes, target="skypilot"), "skypilot")


def test_results_must_outlive_the_machine() -> None:
    no_bucket = ("submission.sky.bucket=null", "run.folder=runs")
    with pytest.raises(ConfigError, match=r"the disk of SkyPilot's machine goes with it: set submission\.sky\.bucket"):
        check(example(*no_bucket, target="skypilot"), "skypilot")
    mirrored = example(*no_bucket, "checkpoint.mirror=s3://bucket/runs", target="skypilot")
    check(mirrored, "skypilot")
    task = yaml.safe_load(render(mirrored, "skypilot")["task.yaml"])
    assert mirrored.config.run.folder == "runs" and "file_mounts" not in task
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror is a place on the machine's own disk"):
        example("checkpoint.mirror=file:///mirror", target="skypilot")


def test_several_machines_do_not_share_a_bucket() -> None:
    two = "resources.nodes=[{count: 2, gpus: 8, cpus: 96, memory_gib: 900}]"
    with pytest.raises(ConfigError, match=r"resources\.nodes has 2 nodes: --to skypilot takes one"):
        check(example(two, target="skypilot"), "skypilot")


def test_files_below_the_working_folder_travel_and_others_are_refused() -> None:
    """The example's prompts are relative; a whole path means the same where it leads into the working folder."""
    whole = example("model.reference=/shared/pilaf_ray/models/reference", target="skypilot").config
    assert whole.model.reference == "models/reference"
    assert whole.prompts.train.path == "data/hh-rlhf-prompts-train.parquet"
    with pytest.raises(ConfigError, match=r"model\.policy = /shared/models/llama is not below the working folder"):
        example("model.policy=/shared/models/llama", target="skypilot")
    # One whose name only begins like the working folder's.
    with pytest.raises(ConfigError, match=r"evaluation\.path = /shared/pilaf_ray2/x\.csv is not below"):
        example("prompts.evaluation.path=/shared/pilaf_ray2/x.csv", target="skypilot")
    with pytest.raises(ConfigError, match=r"run\.folder = /shared/runs, model\.policy = /a/b/c are not below"):
        example("submission.sky.bucket=null", "model.policy=/a/b/c", target="skypilot")


@pytest.mark.parametrize(("gpus", "extra"), [(8, "'.[gpu]'"), (0, "setup_env.sh ~/pilaf-venv")])
def test_the_environment_is_one_of_its_own(gpus: int, extra: str) -> None:
    """SkyPilot's own Python is 3.10; what is set up is what runs."""
    nodes = f"resources.nodes=[{{count: 1, gpus: {gpus}, cpus: 96, memory_gib: 900}}]"
    task = yaml.safe_load(render(example(nodes, target="skypilot"), "skypilot")["task.yaml"])
    assert extra in task["setup"] and "3.11" in task["setup"]
    assert "\n. ~/pilaf-venv/bin/activate\n" in task["run"]
    for script in (task["setup"], task["run"]):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def run_task(folder: Path, *, ray: str, driver: str) -> subprocess.CompletedProcess[str]:
    """The task's commands, in bash, with stand-ins for ``ray`` and the driver."""
    task = yaml.safe_load(render(example(target="skypilot"), "skypilot")["task.yaml"])
    programs = folder / "pilaf-venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"export PATH={programs}:$PATH\n")
    for name, text in (("ray", ray), ("python", driver)):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"HOME": str(folder), "PATH": os.environ["PATH"]}
    command = ["bash", "-c", task["run"]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=30)


RAY = 'if [ "$1" = start ]; then echo $$ >head.pid; exec sleep 60; fi'


def test_the_task_ends_with_its_driver_and_leaves_no_ray(tmp_path: Path) -> None:
    # A driver that ends at once may end before the stand-in in the background has begun.
    driver = 'until [ -s head.pid ]; do sleep 0.01; done; echo "$RAY_ADDRESS $*"; exit 3'
    done = run_task(tmp_path, ray=RAY, driver=driver)
    assert (done.returncode, done.stdout) == (3, f"127.0.0.1:6379 -m pilaf_ray train {NAME}.json --restartable\n")
    assert RunConfig.model_validate_json((tmp_path / f"{NAME}.json").read_text()) == example(target="skypilot").config
    assert not Path(f"/proc/{(tmp_path / 'head.pid').read_text().strip()}").exists()


def test_a_stopped_task_waits_for_its_driver_to_save(tmp_path: Path) -> None:
    """TERM to the script reaches the driver, whose own exit code is the task's."""
    driver = "trap 'echo saved; exit 0' TERM; kill -TERM $PPID; while :; do sleep 0.05; done"
    done = run_task(tmp_path, ray=RAY, driver=driver)
    assert (done.returncode, done.stdout) == (0, "saved\n")


def test_a_ray_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    done = run_task(tmp_path, ray="exit 1", driver="echo never")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: Ray did not start\n")


def test_a_task_is_handed_over_with_the_names_of_its_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sky = FakeClient("sky", tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "value")
    assert SkyPilot().submit(example("submission.secrets=[WANDB_API_KEY]", target="skypilot")) == NAME
    (call,) = sky.calls
    assert call.startswith(f"jobs launch --yes --detach-run --name {NAME} --secret WANDB_API_KEY /")


def test_logs_of_a_job_that_runs_or_failed_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its exit codes: 101 is a job that has not ended, 100 one that failed, 102 one that is not there."""
    sky, lines = FakeClient("sky", tmp_path, monkeypatch), []
    for code in (101, 100):
        sky.answer(("jobs logs", "a line\\n", code))
        SkyPilot().logs(NAME, follow=False, write=lines.append)
        assert sky.calls == [f"jobs logs --name {NAME} --no-follow"]
    assert lines == ["a line"] * 2
    with pytest.raises(ClusterError, match="sky jobs ended with exit code 100: the job failed"):
        SkyPilot().logs(NAME, follow=True, write=lines.append)
    sky.answer(("jobs logs", "", 102))
    with pytest.raises(ClusterError, match="exit code 102"):
        SkyPilot().logs(NAME, follow=False, write=lines.append)


def test_jobs_of_skypilot_are_called_as_logs_and_stop_take_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [{"job_name": "pilaf-b", "status": "RUNNING"}, {"job_name": None, "status": "PENDING"}]
    rows += [{"job_name": "other", "status": "RUNNING"}, {"job_name": "pilaf-a", "status": "SUCCEEDED"}]
    FakeClient("sky", tmp_path, monkeypatch).answer(("jobs queue --output json", json.dumps(rows), 0))
    assert [(job.job_id, job.state) for job in SkyPilot().jobs()] == [("pilaf-a", "SUCCEEDED"), ("pilaf-b", "RUNNING")]
