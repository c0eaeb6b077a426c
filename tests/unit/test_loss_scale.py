"""Float16 without a device that has it: what is refused, and what a step of DeepSpeed's is taken for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pilaf_ray.config.loader import load_config
from pilaf_ray.engines.loss_scale import LossScale, OptimizerStep, float16_hint, float16_section, scaling_kept
from pilaf_ray.errors import ConfigError
from pilaf_ray.float16_roles import check_float16_roles, slow_float16_roles

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


class Scaler:
    """As DeepSpeed's dynamic one: halves at an overflow."""

    dynamic = True

    def __init__(self, scale: float, *, steps: int = 0) -> None:
        self.scale, self.raise_error_at_min_scale = scale, True
        self.cur_iter, self.last_overflow_iter = steps, -1

    def update(self, overflow: bool) -> None:
        if overflow:
            if self.scale == 1 and self.raise_error_at_min_scale:
                raise AssertionError("it ends the process")
            self.scale, self.last_overflow_iter = max(1.0, self.scale / 2), self.cur_iter
        self.cur_iter += 1


class Optimizer:
    """With ZeRO or without."""

    def __init__(self, stage: int, scaler: Scaler) -> None:
        self.overflow, self._scaler = False, scaler
        setattr(self, "loss_scaler" if stage else "loss_scale_config", scaler)

    @property
    def loss_scale(self) -> float:
        return self._scaler.scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._scaler.scale = value


class Engine:
    """A DeepSpeed engine of a stage whose gradient, with the scale in it, has the norm ``scaled``."""

    def __init__(self, stage: int, scaler: Scaler, scaled: float) -> None:
        self.stage, self.scaler, self.scaled, self.norm = stage, scaler, scaled, 0.0
        self.optimizer = Optimizer(stage, scaler)
        if stage == 0:
            scaler.raise_error_at_min_scale = False

    def step(self) -> None:
        before = self.scaler.scale
        self.optimizer.overflow = self.scaled == float("inf")
        self.scaler.update(self.optimizer.overflow)
        self.norm = self.scaled / before if self.stage else self.scaled

    def get_global_grad_norm(self) -> float:
        return self.norm


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("steps", "after"), [(0, 1024.0), (998, 1024.0), (999, 2048.0), (1000, 1024.0)])
def test_norms_are_those_of_the_gradient_itself_and_the_scale_rises_after_calm(
    stage: int, steps: int, after: float
) -> None:
    engine: Any = Engine(stage, Scaler(1024.0, steps=steps), 2048.0)
    scale = LossScale(engine, zero_stage=stage)
    assert float(scale.scaled(torch.tensor(3.0))) == (3072.0 if stage == 0 else 3.0), "DeepSpeed does it under ZeRO"
    taken = scale.step()
    assert taken.metrics() == {"grad_norm": 2.0, "loss_scale": 1024.0, "skipped": 0.0}
    assert scale.value == after


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_overflows_are_skipped_until_no_scale_is_left(stage: int) -> None:
    engine: Any = Engine(stage, Scaler(4.0), float("inf"))
    scale = LossScale(engine, zero_stage=stage)
    steps = [scale.step() for _ in range(3)]
    assert [step.loss_scale for step in steps] == [4.0, 2.0, 1.0]
    assert [step.skipped for step in steps] == [True, True, False]
    assert [float(step.norm) for step in steps] == [0.0, 0.0, float("inf")], "what is not skipped is refused"
    assert steps[0].metrics("value_") == {"value_grad_norm": 0.0, "value_loss_scale": 4.0, "value_skipped": 1.0}
    assert steps[2].gradient == "gradient at loss scale 1"


def test_other_formats_have_no_scale() -> None:
    taken = OptimizerStep(norm=torch.tensor(0.5))
    assert taken.metrics() == {"grad_norm": 0.5} and taken.gradient == "gradient"
    assert float16_hint("bfloat16", setting="learner.precision") == ""
    assert "set learner.precision: float32" in float16_hint("float16", setting="learner.precision")


def test_the_scale_starts_high_and_falls_at_every_overflow() -> None:
    section = float16_section()
    assert (section["loss_scale"], section["initial_scale_power"], section["hysteresis"]) == (0, 16, 1)


def test_a_checkpoint_of_another_format_does_not_bring_its_scaling() -> None:
    own, fresher, static = Scaler(8.0), Scaler(2.0), SimpleNamespace(dynamic=False)
    for loaded, kept in ((fresher, fresher), (static, own)):
        optimizer = SimpleNamespace(loss_scaler=own, dynamic_loss_scale=True)
        with scaling_kept(optimizer):
            optimizer.loss_scaler, optimizer.dynamic_loss_scale = loaded, loaded.dynamic
        assert optimizer.loss_scaler is kept and optimizer.dynamic_loss_scale
    for dynamic, scale in ((True, 2.0), (False, 8.0)):
        optimizer = SimpleNamespace(loss_scale_config=SimpleNamespace(dynamic_loss_scale=True, cur_scale=8.0))
        with scaling_kept(optimizer):
            # Without ZeRO it is written over in place.
            optimizer.loss_scale_config.dynamic_loss_scale = dynamic
            optimizer.loss_scale_config.cur_scale = 2.0
        assert optimizer.loss_scale_config.cur_scale == scale and optimizer.loss_scale_config.dynamic_loss_scale
    with scaling_kept(plain := SimpleNamespace()):
        pass
    assert vars(plain) == {}


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["learner.precision=float16"], "learner.precision"),
        (["reward_model={precision: float16}"], "reward_model.precision"),
    ],
)
def test_learners_in_float16_are_refused_on_cpus_without_its_units(
    overrides: list[str], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(TINY, overrides)
    with pytest.raises(ConfigError, match=rf"^{setting}: float16 is not trained on this node.*: float32$") as refusal:
        check_float16_roles(config, has_units=lambda: False)
    assert "\n" not in str(refusal.value)
    check_float16_roles(config, has_units=lambda: True)
    role = setting.split(".")[0].removesuffix("_model")
    check_float16_roles(load_config(TINY, [*overrides, f"resources.{role}.gpus=1"]), has_units=lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    check_float16_roles(config, has_units=lambda: False)


def test_roles_that_only_look_are_told_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    oracle = "oracle={type: reward_model, path: x, dtype: float16, label_rule: {type: argmax}}"
    config = load_config(TINY, ["model.dtype=float16", oracle])
    lines = slow_float16_roles(config, has_units=lambda: False)
    assert [line.split(":")[0] for line in lines] == ["model.dtype", "oracle.dtype"]
    assert all(line.endswith(": float32") for line in lines)
    assert slow_float16_roles(config, has_units=lambda: True) == []
    on_gpus = [f"resources.{role}.gpus=1" for role in ("generator", "reference", "oracle")]
    assert (
        slow_float16_roles(load_config(TINY, ["model.dtype=float16", oracle, *on_gpus]), has_units=lambda: False) == []
    )
    assert slow_float16_roles(load_config(TINY), has_units=lambda: False) == []
