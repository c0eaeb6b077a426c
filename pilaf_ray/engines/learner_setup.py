"""Making a DeepSpeed engine."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pilaf_ray.engines.loss_scale import FLOAT16, float16_section
from pilaf_ray.engines.zero_options import NO_OFFLOAD, OffloadSettings, zero_section
from pilaf_ray.memory import LARGEST_BUCKET


def schedule_factor(name: str, *, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Learning-rate factor of step number ``done`` (0 for the first): linear warm-up, then ``name``."""

    def factor(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / (warmup_steps + 1)
        progress = min(1.0, (done - warmup_steps) / max(1, total_steps - warmup_steps))
        if name == "linear":
            return 1.0 - progress
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor


def make_engine(
    model: nn.Module,
    *,
    zero_stage: int,
    precision: str,
    accumulation: int,
    learning_rate: float,
    lr_schedule: str,
    warmup_steps: int,
    total_steps: int,
    weight_decay: float,
    betas: tuple[float, float],
    max_grad_norm: float,
    head: Sequence[nn.Parameter] = (),
    head_learning_rate: float | None = None,
    offload: OffloadSettings = NO_OFFLOAD,
    hybrid_ranks: int = 1,
) -> tuple[Any, LambdaLR]:
    """A DeepSpeed engine and its schedule; parameters of ``head`` may have a learning rate of their own.

    With ``bfloat16`` and ``float16`` the optimizer keeps fp32 master weights: small learning rates
    round away in 16 bits.
    """
    import deepspeed

    apart = {id(p) for p in head} if head_learning_rate is not None else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    # DeepSpeed takes its bucket whole, 500 million elements by default, at each backward pass; no more than all
    # gradients ever lie in it, and on CPUs a larger one spreads over memory that is never given back.
    bucket = min(LARGEST_BUCKET, sum(p.numel() for p in trained))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero_section(
            zero_stage, offload=offload, hybrid_ranks=hybrid_ranks, pin_memory=torch.cuda.is_available()
        )
        | {"reduce_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
        # An offloaded step is PyTorch's own fused AdamW: DeepSpeed's has to be compiled first, and rounds otherwise.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    settings |= _precision_section(precision)
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in apart]}]
    if apart:
        groups.append({"params": list(head), "lr": head_learning_rate})
    optimizer = torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=betas,
        weight_decay=weight_decay,
        fused=True,
    )
    factor = schedule_factor(lr_schedule, warmup_steps=warmup_steps, total_steps=total_steps)
    schedule = LambdaLR(optimizer, factor)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if zero_stage == 0 and precision != "float32":
        # To make its states DeepSpeed has taken a step without a gradient, which Adam counts, and which decays masters.
        optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine, schedule


def _precision_section(precision: str) -> dict[str, Any]:
    """DeepSpeed's section for a format of 16 bits; nothing for fp32."""
    if precision == "bfloat16":
        return {"bf16": {"enabled": True}}
    return {"fp16": float16_section()} if precision == FLOAT16 else {}
