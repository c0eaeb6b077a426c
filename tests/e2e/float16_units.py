"""Float16 on machines whose processor has no units for it."""

import os


def pretend_float16_units() -> None:
    """Let DeepSpeed train in float16 in this process, by PyTorch's slow products: enough for a tiny model."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda accelerator: True
