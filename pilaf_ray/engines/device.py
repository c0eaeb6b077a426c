"""Which number format a role computes in without crawling."""

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


def resolve_dtype(setting: str, *, on_gpu: bool, flags: frozenset[str] | None = None) -> str:
    """``float32`` or ``bfloat16``; ``auto`` takes bfloat16 where the role's hardware multiplies it.

    A CPU without bf16 units emulates it, which is many times slower than fp32.

    Args:
        setting: of the configuration.
        on_gpu: whether the role reserves GPUs. The driver's own machine may have none, as a cluster's head or a laptop.
        flags: of the CPU that the role is on; this machine's when left out.
    """
    if setting != "auto":
        return setting
    fast = on_gpu or bool(_FAST_BFLOAT16 & (cpu_flags() if flags is None else flags))
    return "bfloat16" if fast else "float32"
