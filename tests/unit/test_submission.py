"""What is handed to a scheduler: complete, valid, without secrets, and the same as the examples in launch/."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jsonschema
import pytest
import yaml
from listeners import closed_port, web_server
from submission_example import EXAMPLE, FILES, ROOT, example

from pilaf_ray import cli
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ClusterError, ConfigError, PlacementError
from pilaf_ray.submission.job import check, job_memory_warnings, job_name, make_job, render
from pilaf_ray.submission.schedulers import run_client
from pilaf_ray.submission.slurm import Slurm


@pytest.mark.parametrize("target", FILES)
def test_examples_in_launch_are_what_submit_writes(target: str) -> None:
    job = example(target=target)
    check(job, target)
    (text,) = render(job, target).values()
    assert (ROOT / "launch" / FILES[target]).read_text() == text


@pytest.mark.parametrize("target", FILES)
def test_no_value_of_a_secret_is_written(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "value-of-the-secret")
    job = example("submission.secrets=[WANDB_API_KEY]", "submission.kubernetes.secret=keys", target=target)
    (text,) = render(job, target).values()
    assert "value-of-the-secret" not in text
    if target == "skypilot":
        assert yaml.safe_load(text)["secrets"] == {"WANDB_API_KEY": None}
    if target == "kuberay":
        head = list(yaml.safe_load_all(text))[1]["spec"]["rayClusterSpec"]["headGroupSpec"]
        assert head["template"]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]


@pytest.mark.parametrize("target", ["slurm", "skypilot"])
def test_secrets_that_are_not_set_are_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST_KEY", "value")
    monkeypatch.delenv("SECOND_KEY", raising=False)
    check(example("submission.secrets=[FIRST_KEY]", target=target), target)
    both = example("submission.secrets=[FIRST_KEY, SECOND_KEY]", target=target)
    with pytest.raises(ConfigError, match=r"^SECOND_KEY of submission\.secrets is not set here"):
        check(both, target)


def test_secrets_of_pods_come_from_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "value")
    with pytest.raises(ConfigError, match=r"submission\.secrets = KEY, and pods do not get this shell's environment"):
        check(example("submission.secrets=[KEY]", target="kuberay"), "kuberay")
    check(example("submission.secrets=[KEY]", "submission.kubernetes.secret=keys", target="kuberay"), "kuberay")


UNKNOWN_MEMORY = (
    "warning: models/llama-3.1-8b-sft: there is no config.json of it in this machine's hub cache, so memory cannot be "
    "estimated: `hf download models/llama-3.1-8b-sft config.json` fetches it"
)


def test_secrets_of_rays_nodes_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", str(EXAMPLE), "submission.secrets=[KEY]", "--dry-run", "--address", closed_port()]
    monkeypatch.setattr(sys, "argv", ["pilaf-ray", *words])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    unknown, note, unchecked = capsys.readouterr().err.splitlines()
    assert unknown == UNKNOWN_MEMORY
    assert note == "note: KEY must be in the environment of `ray start` on the nodes"
    assert unchecked.startswith("note: whether the roles fit is not checked: no Ray job server answers at http://127.")


def cluster_of(*gpus: int) -> dict[str, tuple[int, str]]:
    """What a head's job server says of nodes with so many GPUs."""
    nodes = [
        {
            "node_id": f"{number}" * 56, "node_name": "n", "node_ip": "10.0.0.1", "is_head_node": number == 0,
            "state": "ALIVE", "state_message": None, "labels": {},
            "resources_total": {"CPU": 96.0, "GPU": float(each), "memory": 2.0**40},
        }
        for number, each in enumerate(gpus)
    ]  # fmt: skip
    counts = {"total": len(nodes), "num_after_truncation": len(nodes), "num_filtered": len(nodes)}
    listing = {"result": True, "msg": "", "data": {"result": {**counts, "result": nodes}}}
    return {
        "/api/version": (200, json.dumps({"ray_version": "2.60.0"})),
        "/api/v0/nodes": (200, json.dumps(listing)),
    }


def test_a_dry_run_checks_the_cluster_as_a_submission_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    words = ["pilaf-ray", "submit", str(EXAMPLE), "--to", "ray", "--dry-run", "--address"]

    def run(*gpus: int) -> tuple[int | str | None, list[str], str]:
        with web_server(cluster_of(*gpus)) as address, pytest.raises(SystemExit) as end:
            monkeypatch.setattr(sys, "argv", [*words, address])
            cli.main()
        told = capsys.readouterr()
        return end.value.code, told.out.splitlines(), told.err

    code, (small, large, command), errors = run(2, 8)
    assert (code, errors) == (0, f"{UNKNOWN_MEMORY}\n")
    placed = sorted(", ".join(line.partition(": ")[2] for line in (small, large)).split(", "))
    assert small.startswith("n/00000000: ") and large.startswith("n/11111111: ")
    assert placed == ["generator-0", "generator-1", *(f"learner-{n}" for n in range(4)), "oracle-0", "reference-0"]
    assert command.startswith("python -m pilaf_ray train pilaf-llama3-8b-hh.json --restartable")
    code, shown, errors = run(4)
    unknown, refused = errors.splitlines()
    assert (code, unknown) == (2, UNKNOWN_MEMORY)
    assert refused.startswith("error: generator-0 and 1 more like it needs 1 GPU, 4 CPUs; beside")
    assert not any("pilaf_ray train" in line for line in shown)


def test_configurations_travel_whole() -> None:
    job = example(target="kuberay")
    config_map, _ = yaml.safe_load_all(render(job, "kuberay")["rayjob.yaml"])
    assert RunConfig.model_validate_json(config_map["data"]["config.json"]) == job.config
    job = example(target="skypilot")
    run = yaml.safe_load(render(job, "skypilot")["task.yaml"])["run"]
    embedded = run.split("<<'CONFIG'\n")[1].split("\nCONFIG\n")[0]
    assert RunConfig.model_validate_json(embedded) == job.config


def test_slurm_script_is_bash_that_parses() -> None:
    script = render(example("submission.slurm.setup='module load cuda'"), "slurm")["job.sbatch"]
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nmodule load cuda\n" in script


def test_a_head_that_does_not_start_is_one_line_of_slurms_script(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    fakes = {
        "scontrol": "echo node-a",
        # Options first; what follows asks for addresses, or starts the head.
        "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" = -w ] && shift; shift; done\n'
        '[ "$1" = sh ] && { echo 10.0.0.1; exit 0; }\nexit 1',
        "ray": "exit 1",
    }
    for name, text in fakes.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    config = load_config(EXAMPLE, [f"run.folder={tmp_path}/runs"])
    script = render(make_job(config, working_dir=tmp_path, target="slurm"), "slurm")["job.sbatch"]
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-a"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    log = tmp_path / "runs" / ".submitted" / "slurm-7" / "ray-node-a.log"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: the Ray head did not start; see {log}\n"


def strict(schema: Any) -> Any:
    """The schema with keys that it does not know refused, as ``kubectl apply --validate=strict`` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if known and not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
        result["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result


@pytest.mark.skipif("KUBERAY_RAYJOB_CRD" not in os.environ, reason="KUBERAY_RAYJOB_CRD names no CRD file (.yaml.gz)")
@pytest.mark.parametrize("overrides", [(), ("submission.kubernetes.queue=q", "submission.kubernetes.secret=s")])
def test_rayjob_is_valid_by_the_official_schema(overrides: tuple[str, ...]) -> None:
    crd = yaml.safe_load(gzip.decompress(Path(os.environ["KUBERAY_RAYJOB_CRD"]).read_bytes()))
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
    labelled = "resources.nodes=[{count: 2, gpus: 8, cpus: 96, memory_gib: 900, labels: {zone: a}}]"
    _, manifest = yaml.safe_load_all(render(example(labelled, *overrides, target="kuberay"), "kuberay")["rayjob.yaml"])
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    validator = jsonschema.Draft202012Validator(strict(schema))
    assert [error.message for error in validator.iter_errors(manifest)] == []
    manifest["spec"]["entrypiont"] = manifest["spec"].pop("entrypoint")
    assert [e.message for e in validator.iter_errors(manifest)] != []


def test_what_cannot_run_is_refused_before_it_is_queued() -> None:
    with pytest.raises(ConfigError, match=r"resources\.nodes is empty: --to slurm asks for the nodes"):
        check(example("resources.nodes=[]"), "slurm")
    with pytest.raises(PlacementError, match="generator-0 and 1 more like it needs 1 GPU, 4 CPUs; beside"):
        check(example("resources.nodes=[{count: 1, gpus: 4, cpus: 96, memory_gib: 900}]"), "slurm")
    two = "resources.nodes=[{gpus: 8, cpus: 96, memory_gib: 900}, {gpus: 4, cpus: 96, memory_gib: 900}]"
    with pytest.raises(ConfigError, match="takes one kind"):
        check(example(two), "slurm")
    check(example(two), "kuberay")


def test_nodes_that_are_too_small_for_the_models_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shapes alone are enough; of a model that is not on this machine it is said that nothing is known."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    shape = ROOT / "configs" / "shapes" / "7b"
    (unknown,) = job_memory_warnings(example())
    assert unknown.startswith(
        "/shared/models/llama-3.1-8b-sft: there is no config.json of it on this machine, so memory"
    )
    models = (f"model.policy={shape}", f"oracle.path={shape}")
    assert job_memory_warnings(example(*models)) == ()
    elsewhere = ("algorithm={type: ppo, value: {path: owner/value}}", "reward_model={}", "resources.reward.gpus=1")
    (unknown,) = job_memory_warnings(example(*models, *elsewhere))
    assert unknown.startswith("owner/value: there is no config.json of it in this machine's hub cache")
    (small,) = job_memory_warnings(example(*models, "generation.kv_cache_gib=1"))
    assert small.startswith("generation.kv_cache_gib = 1 holds 2 sequences of model.max_length = 1536 tokens")
    nodes = "resources.nodes=[{count: 1, gpus: 8, cpus: 96, memory_gib: 900, gpu_memory_gib: 40}]"
    words = ["submit", str(EXAMPLE), f"run.folder={tmp_path}", *models, nodes, "--to", "slurm", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["pilaf-ray", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert "warning: generator would take 72 GiB of a GPU that has 40" in capsys.readouterr().err


def test_paths_that_exist_are_absolute_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "models" / "policy").mkdir(parents=True)
    config = load_config(EXAMPLE, ["model.policy=models/policy"])
    job = make_job(config, working_dir=tmp_path, target="slurm")
    assert job.config.model.policy == str(tmp_path / "models" / "policy")
    assert job.config.oracle.path == "Skywork/Skywork-Reward-Llama-3.1-8B"
    assert job.config.run.folder == str(tmp_path / "runs")
    assert job.config_path == tmp_path / "runs" / ".submitted" / "llama3-8b-hh.json"


def test_names_are_those_that_kubernetes_takes_and_no_two_runs_have_one() -> None:
    assert job_name("llama3-8b-hh") == "pilaf-llama3-8b-hh"
    # By `printf %s NAME | sha256sum`.
    assert job_name("Llama_3.1 8B--x") == "pilaf-llama-3-1-8b-x-dee6e9"
    assert job_name("x" * 41) == f"pilaf-{'x' * 41}"
    alike = ["a-b", "a_b", "A-b", "a--b", "a-b-", "-", "_", *(f"{'x' * 50}{n}" for n in range(3))]
    names = [job_name(name) for name in alike]
    assert len(set(names)) == len(alike)
    assert all(len(name) <= 47 and re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) for name in names)


@pytest.mark.parametrize("target", ["slurm", "skypilot"])
def test_nodes_offer_ray_the_memory_that_the_plan_counts(target: str) -> None:
    nodes = "resources.nodes=[{count: 1, gpus: 8, cpus: 96, memory_gib: 1.5}]"
    (text,) = render(example(nodes, target=target), target).values()
    assert f"--num-cpus=96 --memory={3 * 2**29}" in text


def test_a_missing_client_and_a_refusal_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="there is no 'sbatch-nowhere' on this machine"):
        run_client(["sbatch-nowhere"])
    with pytest.raises(ClusterError, match=r"ls /nowhere refused: .*No such file"):
        run_client(["ls", "/nowhere"])
    fake = tmp_path / "squeue"
    fake.write_text("#!/bin/sh\necho '7|RUNNING|None|pilaf-a'; echo '8|PENDING|Resources|other'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [status.job_id for status in Slurm().jobs()] == ["7"]


def test_a_followed_job_of_slurm_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its output appears while it is followed: half a line, the rest, and the last line after it has ended."""
    output, states = tmp_path / "job.out", tmp_path / "states"
    for name, text in (
        ("scontrol", f"echo '   StdErr=/dev/null'; echo '   StdOut={output}'"),
        ("squeue", f"head -n 1 {states}; sed -i 1d {states}"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    arrivals = iter(["one\ntw", "o\n", "three"])

    def sleep(_: float) -> None:
        with output.open("a") as file:
            file.write(next(arrivals))

    lines: list[str] = []
    states.write_text("PENDING\nRUNNING\nPENDING\nCOMPLETED\nCOMPLETED\n")
    Slurm(sleep=sleep).logs("7", follow=True, write=lines.append)
    assert lines == ["one", "two", "three"]
    states.write_text("FAILED\nFAILED\n")
    with pytest.raises(ClusterError, match=rf"job 7 ended as FAILED; its output is {output}"):
        Slurm(sleep=sleep).logs("7", follow=True, write=lines.append)


def test_a_client_that_hangs_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "squeue"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ClusterError, match=r"squeue --me did not answer within 0\.1 s"):
        run_client(["squeue", "--me"], seconds=0.1)


def test_dry_run_prints_and_queues_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", str(EXAMPLE), f"run.folder={tmp_path}", "--to", "slurm", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["pilaf-ray", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "#SBATCH --gpus-per-node=8" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
