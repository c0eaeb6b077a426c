"""A run as a scheduler sees it, and the files that hand it over."""

import hashlib
import json
import os
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pilaf_ray.config.resources import NodeConfig
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ConfigError
from pilaf_ray.memory_checks import memory_warnings
from pilaf_ray.placement import GIB
from pilaf_ray.resource_plan import plan_on, planned_nodes
from pilaf_ray.submission.places import absolute, below, require_on_volume

TARGETS = ("ray", "slurm", "kuberay", "skypilot")
_PREFIX, _LONGEST = "pilaf-", 47
_TEMPLATES = {
    "slurm": ("slurm.sbatch.j2", "job.sbatch"),
    "kuberay": ("rayjob.yaml.j2", "rayjob.yaml"),
    "skypilot": ("sky.yaml.j2", "task.yaml"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One submission: what runs, where its files are, and what it needs."""

    name: str
    """Valid as a Kubernetes name: lower case, digits and dashes."""
    config: RunConfig
    config_path: Path
    """Where the driver reads the resolved configuration."""
    working_dir: Path

    @property
    def entrypoint(self) -> str:
        """The command of the driver; it starts the run, or goes on with it after an interruption."""
        return f"python -m pilaf_ray train {shlex.quote(str(self.config_path))} --restartable"

    @property
    def nodes(self) -> tuple[NodeConfig, ...]:
        """The kinds of nodes asked for."""
        return tuple(self.config.resources.nodes)

    @property
    def num_nodes(self) -> int:
        """How many nodes, of all kinds."""
        return sum(node.count for node in self.nodes)


def make_job(config: RunConfig, *, working_dir: Path, target: str) -> Job:
    """The job of ``config`` as ``target`` will run it, with paths that mean the same on its machines.

    Raises:
        ConfigError: a path names what no machine of the target's can see.
    """
    root = working_dir.resolve()
    placed = absolute(config, root)
    path = Path(placed.run.folder) / ".submitted" / f"{config.run.name}.json"
    match target:
        case "ray":
            path = Path(f"{job_name(config.run.name)}.json")
        case "kuberay":
            require_on_volume(placed, placed.submission.kubernetes.mount_path)
            path = Path("/etc/pilaf/config.json")
        case "skypilot":
            placed = below(placed, root, mounted=placed.submission.sky.bucket is not None)
            path = Path(f"{job_name(config.run.name)}.json")
    return Job(name=job_name(config.run.name), config=placed, config_path=path, working_dir=root)


def job_name(run_name: str) -> str:
    """``pilaf-`` and the run's name in the letters that every scheduler takes, at most 47 as KubeRay wants.

    Where the name must change for that, six digits of its hash keep it apart from others that would become the same.
    """
    letters = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if letters == run_name and len(letters) <= _LONGEST - len(_PREFIX):
        return _PREFIX + letters
    digits = hashlib.sha256(run_name.encode()).hexdigest()[:6]
    kept = letters[: _LONGEST - len(_PREFIX) - len(digits) - 1].rstrip("-")
    return _PREFIX + (f"{kept}-{digits}" if kept else digits)


def check(job: Job, target: str) -> None:
    """Raise PlacementError or ConfigError before anything is queued that could not run."""
    _require_secrets(job, target)
    if target == "ray":
        return
    if not job.nodes:
        raise ConfigError(
            f"resources.nodes is empty: --to {target} asks for the nodes that it lists, "
            "e.g. resources.nodes=[{count: 1, gpus: 8, cpus: 96, memory_gib: 900}]"
        )
    if target in ("slurm", "skypilot") and len(job.nodes) > 1:
        raise ConfigError(f"resources.nodes lists {len(job.nodes)} kinds of nodes: --to {target} takes one kind")
    if target == "skypilot":
        _require_accelerators(job)
        _require_lasting_results(job)
    plan_on(job.config, planned_nodes(job.config)).require()


def job_memory_warnings(job: Job) -> tuple[str, ...]:
    """As :func:`pilaf_ray.memory_checks.memory_warnings`, for the nodes that are listed; without any, nothing."""
    config = absolute(job.config, job.working_dir)
    return memory_warnings(config, plan_on(config, planned_nodes(config))) if job.nodes else ()


def _require_accelerators(job: Job) -> None:
    """SkyPilot must be told the kind of GPU, and as many of them as the plan counts on."""
    named, gpus = job.config.submission.sky.accelerators, int(job.nodes[0].gpus)
    _, _, count = (named or "").partition(":")
    if (int(count) if count.isdigit() else int(named is not None)) != gpus:
        raise ConfigError(
            f"submission.sky.accelerators = {named or 'null'}, but resources.nodes has {gpus} GPUs a node: "
            f"name that many, {f'e.g. H100:{gpus}' if gpus else 'so none (null)'}"
        )


def _require_secrets(job: Job, target: str) -> None:
    """Raise ConfigError where a name of ``submission.secrets`` would be empty in the job, as far as is known here."""
    submission = job.config.submission
    names = submission.secrets
    if target == "kuberay" and names and submission.kubernetes.secret is None:
        raise ConfigError(
            f"submission.secrets = {', '.join(names)}, and pods do not get this shell's environment: name a Kubernetes "
            "secret that has them as keys, submission.kubernetes.secret"
        )
    missing = [name for name in names if not os.environ.get(name)]
    if target in ("slurm", "skypilot") and missing:
        raise ConfigError(
            f"{', '.join(missing)} of submission.secrets {'is' if len(missing) == 1 else 'are'} not set here, and the "
            f"job takes {'it' if len(missing) == 1 else 'them'} from this shell: export what is missing"
        )


def _require_lasting_results(job: Job) -> None:
    """SkyPilot's machines end with their disks, and a bucket is not one folder for several of them."""
    if job.config.submission.sky.bucket is None and job.config.checkpoint.mirror is None:
        raise ConfigError(
            "the disk of SkyPilot's machine goes with it: set submission.sky.bucket, e.g. s3://bucket, which is "
            "mounted at run.folder, or checkpoint.mirror, e.g. s3://bucket/runs, where checkpoints are copied"
        )
    if job.num_nodes > 1:
        raise ConfigError(
            f"resources.nodes has {job.num_nodes} nodes: --to skypilot takes one, because several machines do not see "
            "each other's files in a mounted bucket at once; take a larger node, or --to slurm, kuberay or ray"
        )


def render(job: Job, target: str) -> dict[str, str]:
    """File name to text of everything that ``target`` needs; no value of a secret is in it."""
    template, file_name = _TEMPLATES[target]
    environment = Environment(
        loader=PackageLoader("pilaf_ray.submission"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = json.dumps
    environment.filters["quote"] = shlex.quote
    text = environment.get_template(template).render(
        job=job,
        config=job.config,
        config_json=job.config.model_dump_json(indent=2),
        submission=job.config.submission,
        label_option=f' --labels "{_labels(job.nodes[0])}"' if job.nodes[0].labels else "",
        start_params=_start_params,
        memory_bytes=int(job.nodes[0].memory_gib * GIB),
        ray_version=version("ray"),
    )
    return {file_name: text}


def _start_params(node: NodeConfig) -> dict[str, str]:
    """``rayStartParams`` of a worker group; KubeRay wants strings."""
    return {"labels": _labels(node)} if node.labels else {}


def _labels(node: NodeConfig) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(node.labels.items()))


def write_config(job: Job) -> None:
    """Put the resolved configuration where the job reads it; raises ConfigError where that cannot be."""
    try:
        job.config_path.parent.mkdir(parents=True, exist_ok=True)
        job.config_path.write_text(job.config.model_dump_json(indent=2))
    except OSError as error:
        raise ConfigError(
            f"cannot write {job.config_path} ({error.strerror or error}): run.folder must be on storage that this "
            "machine and the nodes share"
        ) from error
