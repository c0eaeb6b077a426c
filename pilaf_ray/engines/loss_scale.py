"""Training in float16: the scale that keeps small gradients from vanishing, and steps that are skipped.

DeepSpeed multiplies the loss with a scale and divides the gradient of its fp32 masters by it. Where a scaled gradient
overflows, it leaves out the step and halves the scale, which is part of its checkpoints. After a long time without, the
scale is doubled here: DeepSpeed does so between the gradient's product and its division, and the step gets half of it.

Gradients that are added directly (``direct_gradients.py``) have no part in this: they are for training without
masters, which float16 never is.
"""

import contextlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pilaf_ray.errors import ConfigError

FLOAT16 = "float16"
SMALLEST_SCALE = 1
"""A gradient that overflows here is none that a scale could mend."""
CALM_STEPS = 1000
"""After so many without an overflow the scale is doubled."""
_NEVER = 2**62


def float16_section() -> dict[str, Any]:
    """DeepSpeed's ``fp16``: dynamic scaling from 2^16, halved at each overflow and never doubled."""
    return {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": _NEVER,
        # Otherwise a step is skipped now and then without anything that changes for the next.
        "hysteresis": 1,
        "min_loss_scale": SMALLEST_SCALE,
    }


def float16_refusal(setting: str) -> str:
    """One line for a device on which DeepSpeed does not train in float16; ``setting`` asks for it."""
    return (
        f"{setting}: float16 is not trained on this node: its processor has no fp16 units (GPUs have them from compute "
        f"capability 7.0 on, CPUs with AVX512-FP16 or AMX-FP16): set {setting}: float32"
    )


def check_float16(precision: str, *, setting: str) -> None:
    """Look, on a machine with a learner rank, whether it can train in ``precision``; before a model is loaded.

    Args:
        setting: what asks for it, e.g. ``learner.precision``.

    Raises:
        ConfigError: it is float16, and the device has no units for it.
    """
    if precision != FLOAT16:
        return
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise ConfigError(float16_refusal(setting))


def float16_hint(precision: str, *, setting: str) -> str:
    """What to add to the remedy for numbers that are not finite; empty but in float16."""
    return f", or set {setting}: float32, for float16 ends at 65504" if precision == FLOAT16 else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerStep:
    """What became of an optimiser's step.

    Example: ``OptimizerStep(norm=torch.tensor(0.0), loss_scale=65536.0, skipped=True)``
    """

    norm: Tensor
    """Of the gradient before clipping and without the scale, a scalar; 0 where the step was skipped."""
    loss_scale: float | None = None
    """What the loss of this step was multiplied with; None but in float16."""
    skipped: bool = False
    """Whether the scaled gradient overflowed, so that no weight has changed and the next scale is smaller."""

    @property
    def gradient(self) -> str:
        """What ``norm`` is of, for a message that it is not finite."""
        return "gradient" if self.loss_scale is None else f"gradient at loss scale {self.loss_scale:g}"

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """By name; all are finite where ``norm`` is."""
        values = {"grad_norm": float(self.norm)}
        if self.loss_scale is not None:
            values |= {"loss_scale": self.loss_scale, "skipped": float(self.skipped)}
        return {prefix + name: value for name, value in values.items()}


class LossScale:
    """The loss scale of an engine in float16.

    Args:
        engine: of DeepSpeed, made with :func:`float16_section`.
        zero_stage: of ``engine``.
    """

    def __init__(self, engine: Any, *, zero_stage: int) -> None:
        self._engine, self._zero_stage = engine, zero_stage
        if zero_stage > 0:
            # It would raise a bare Exception, and without ZeRO go on for ever.
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    @property
    def value(self) -> float:
        """Of the next step."""
        return float(self._engine.optimizer.loss_scale)

    def scaled(self, loss: Tensor) -> Tensor:
        """What ``engine.backward`` is to be called with.

        Without ZeRO DeepSpeed 0.19 divides gradients by the scale, and multiplies no loss with it.
        """
        return loss * self.value if self._zero_stage == 0 else loss

    def step(self) -> OptimizerStep:
        """The engine's step; with a norm that is not finite where even the smallest scale gave an overflow."""
        used = self.value
        self._engine.step()
        if self._engine.optimizer.overflow:
            skipped = used > SMALLEST_SCALE
            return OptimizerStep(norm=torch.tensor(0.0 if skipped else torch.inf), loss_scale=used, skipped=skipped)
        self._raise_after_calm()
        norm = torch.as_tensor(self._engine.get_global_grad_norm())
        # ZeRO has divided it already.
        return OptimizerStep(norm=norm if self._zero_stage > 0 else norm / used, loss_scale=used)

    def _raise_after_calm(self) -> None:
        optimizer = self._engine.optimizer
        counts = optimizer.loss_scaler if self._zero_stage > 0 else optimizer.loss_scale_config
        calm = counts.cur_iter - counts.last_overflow_iter - 1
        if calm > 0 and calm % CALM_STEPS == 0:
            optimizer.loss_scale = 2 * self.value


@contextlib.contextmanager
def scaling_kept(optimizer: Any) -> Iterator[None]:
    """Load a checkpoint within: scaling that it brings from another number format is not taken over.

    Args:
        optimizer: of DeepSpeed's engine. It takes over whatever it finds, and would train in float16 without a scale
            after a checkpoint in bfloat16.
    """
    scaler, settings = getattr(optimizer, "loss_scaler", None), copy(getattr(optimizer, "loss_scale_config", None))
    yield
    if scaler is not None and type(optimizer.loss_scaler) is not type(scaler):
        optimizer.loss_scaler, optimizer.dynamic_loss_scale = scaler, scaler.dynamic
    if settings is not None and settings.dynamic_loss_scale != optimizer.loss_scale_config.dynamic_loss_scale:
        optimizer.loss_scale_config = settings
