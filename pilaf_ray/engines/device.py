"""Which number format a role computes in without crawling."""

from pathlib import Path

_FAST_BFLOAT16 = {"amx_bf16", "avx512_bf16"}


_CPUINFO = Path("/proc/cpuinfo")


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Instruction-set flags of the first processor; empty where the file is missing."""
    return frozenset(_first_processors("flags", cpuinfo).split())


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """What the first processor calls itself; empty where nothing says so."""
    return _first_processors("model name", cpuinfo)


def _first_processors(key: str, cpuinfo: Path) -> str:
    if not cpuinfo.exists():
        return ""
    for line in cpuinfo.read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return ""


def resolve_dtype(setting: str, *, on_gpu: bool, flags: frozenset[str] | None = None) -> str:
    """``float32``, ``bfloat16`` or ``float16``; ``auto`` takes bfloat16 where the role's hardware multiplies it.

    A CPU without bf16 units emulates it, which is many times slower than fp32. GPUs without them have fp16 units.

    Args:
        setting: of the configuration.
        on_gpu: whether the role reserves GPUs. The driver's own machine may have none, as a cluster's head or a laptop;
            then they are taken for such that multiply bfloat16.
        flags: of the CPU that the role is on; this machine's when left out.
    """
    if setting != "auto":
        return setting
    if on_gpu:
        return "bfloat16" if gpus_have_bfloat16() else "float16"
    return "bfloat16" if _FAST_BFLOAT16 & (cpu_flags() if flags is None else flags) else "float32"


def gpus_have_bfloat16() -> bool:
    """Whether this machine's first GPU has units for bfloat16; true where there is no GPU."""
    import torch

    # PyTorch says yes to what it emulates as well, and vLLM does not take that.
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_float16() -> bool:
    """Whether this machine's CPU multiplies fp16, as DeepSpeed asks."""
    import torch

    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return asked is not None and bool(asked())
