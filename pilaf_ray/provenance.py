"""What figures were computed with, for the files that they are written to."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from pilaf_ray.engines.device import cpu_flags, cpu_name
from pilaf_ray.node_agreement import installed_versions

_FAST_UNITS = frozenset({"avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd"})


def made_with() -> dict[str, Any]:
    """Commit, versions and machine of this process, as plain data.

    Example: ``{"commit": "44b5656", "versions": {"torch": "2.13.0", …}, "machine": {"cpu": "…", "cores": 2, …}}``
    """
    return {"commit": commit(), "versions": dict(installed_versions()), "machine": machine()}


def machine() -> dict[str, Any]:
    """Processor, the cores that this process may use, and its units that decide speed."""
    return {
        "cpu": cpu_name() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "units": sorted(cpu_flags() & _FAST_UNITS),
        "system": platform.platform(),
    }


def commit(root: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the code at ``root``, marked ``-dirty`` where files differ from it; None outside a checkout.

    Without a checkout the version and the digest of the code (``versions.pilaf_ray``) still say which it was.
    """
    # Asked first: an installed package may lie in the checkout of another project.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
