"""Which number format this machine computes in without crawling."""

from pathlib import Path

_FAST_BFLOAT16 = {"amx_bf16", "avx512_bf16"}


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction-set flags of the first processor; empty where the file is missing."""
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def resolve_dtype(setting: str) -> str:
    """``float32`` or ``bfloat16``; ``auto`` takes bfloat16 where the hardware multiplies it.

    A CPU without bf16 units emulates it, which is many times slower than fp32.
    """
    if setting != "auto":
        return setting
    import torch

    fast = torch.cuda.is_available() or bool(_FAST_BFLOAT16 & cpu_flags())
    return "bfloat16" if fast else "float32"
