"""What a role says of its memory."""

import subprocess
import sys

import psutil
import pytest

from pilaf_ray.observability.usage import resident_mib

_CHILD = """
import subprocess, sys
grandchild = [sys.executable, "-c", "held = bytearray(b'x') * (64 << 20); print('ready', flush=True); input()"]
subprocess.run(grandchild)
"""


def test_memory_counts_processes_that_started_processes() -> None:
    before = resident_mib()
    with subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        own = psutil.Process()
        whole = sum(process.memory_info().rss for process in (own, *own.children(recursive=True))) / 2**20
        assert resident_mib() == pytest.approx(whole, rel=0.02)
        assert resident_mib() > before + 64
        child.communicate(b"\n")
