"""What vLLM's engine is told on CPUs, where its own choices cost time."""

from typing import Any

import torch
from torch import Tensor

BLOCK_TOKENS = 32
"""The fewest that its attention takes. Prompts share whole blocks of the cache only, and vLLM would take 128."""
_KERNELS = "pilaf_cpu"


def cpu_options() -> dict[str, Any]:
    """Engine arguments for CPUs; none elsewhere."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    priority = [_KERNELS, "native"]
    return {"block_size": BLOCK_TOKENS, "ir_op_priority": {"rms_norm": priority, "fused_add_rms_norm": priority}}


def register_kernels() -> None:
    """Offer vLLM's compiled norms on CPUs too, where it has them but runs several passes of PyTorch instead."""
    from vllm import ir
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or _KERNELS in ir.ops.rms_norm.impls:
        return
    current_platform.import_kernels()

    @ir.ops.rms_norm.register_impl(_KERNELS, supports_args=_plain)
    def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        output = torch.empty_like(x)
        torch.ops._C.rms_norm(output, x, weight, epsilon)
        return output

    @ir.ops.fused_add_rms_norm.register_impl(_KERNELS, supports_args=_plain_residual, inplace=True)
    def _fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


def _plain(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """What the compiled norm computes: whole rows, one number format."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()


def _plain_residual(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _plain(x, weight, epsilon, variance_size) and x_residual.is_contiguous()
