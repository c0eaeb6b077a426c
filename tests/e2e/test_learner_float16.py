"""Float16 gives the training of float32 up to rounding, skips steps that overflow, and resumes with its scale."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from float16_units import pretend_float16_units
from learner_batches import batch, weighted
from rank_processes import RankProcesses
from test_rollout_learner import make as make_rollout_learner
from test_rollout_learner import rollouts

from pilaf_ray.data.tiny_models import make_tiny_llama, make_tiny_reward_model
from pilaf_ray.engines.device import cpu_has_float16
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.loss_scale import CALM_STEPS
from pilaf_ray.engines.zero_options import OffloadSettings
from pilaf_ray.errors import ConfigError, NonFiniteLossError

STEPS, CLIP, TOO_LARGE = 3, 0.01, 2.0**24


@dataclass
class Trained:
    """What rank 0 tells of its training."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    moment: float = 0.0
    """Norm of Adam's first moment after one step, which knows of clipping and scales; on one rank only."""
    first_scale: float = 0.0
    last_scale: float = 0.0
    """Of the third step; the second was the last of many without an overflow."""
    overflows: list[dict[str, float]] = field(default_factory=list)
    """Metrics of steps from a scale that is too large, up to the first that was taken."""
    stayed: bool = False
    moved: bool = False
    resumed: list[tuple[float, float]] = field(default_factory=list)
    """(scale, loss) of the step after a save: of the learner itself, loaded again, and of a new one."""
    elsewhere: tuple[float, float] = (0.0, 0.0)
    """Loss of that step in float32, and whether it has a scale."""
    refusals: list[str] = field(default_factory=list)


Run = Callable[[int, int, str], Trained]


def make(place: dict[str, Any], stage: int, precision: str, model: Path, out: Path, **more: Any) -> Any:
    from pilaf_ray.engines.learner import PolicyLearner

    return PolicyLearner(
        **place,
        model_path=str(model),
        zero_stage=stage,
        precision=precision,
        loss="dpo",
        beta=0.1,
        label_smoothing=0.0,
        learning_rate=1e-3,
        lr_schedule="constant",
        warmup_steps=0,
        total_steps=10,
        max_grad_norm=CLIP,
        micro_batch_tokens=48,
        dump_folder=out / "failed",
        **more,
    )


def weights(learner: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in learner._engine.named_weights()}


def same(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return all(bool((tensor == others[name]).all()) for name, tensor in some.items())


def first_moment(learner: Any) -> float:
    optimizer = learner._engine._engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return float(sum(float(state["exp_avg"].double().square().sum()) for state in states) ** 0.5)


def train(place: dict[str, Any], stage: int, precision: str, model: Path, out: Path) -> Trained:
    pretend_float16_units()
    learner, found = make(place, stage, precision, model, out), Trained()
    for step in range(1, STEPS + 1):
        result = learner.train_step(step, batch())
        found.losses.append(result.loss)
        found.norms.append(result.metrics["grad_norm"])
        if step == 1 and place["world_size"] == 1:
            found.moment = first_moment(learner)
        if step == 1 and precision == "float16":
            found.first_scale = result.metrics["loss_scale"]
            almost_calm(learner)
    if precision == "float16":
        found.last_scale = result.metrics["loss_scale"]
        overflow(learner, found)
        resume(learner, found, place, stage, model, out)
        refuse(learner, found, out)
    return found


def almost_calm(learner: Any) -> None:
    """As if the next step were the last that a scale of 1024 has to last for."""
    optimizer = learner._engine._engine.optimizer
    optimizer.loss_scale = 1024.0
    counts = optimizer.loss_scaler if hasattr(optimizer, "loss_scaler") else optimizer.loss_scale_config
    counts.cur_iter = CALM_STEPS - 1


def overflow(learner: Any, found: Trained) -> None:
    learner._engine._engine.optimizer.loss_scale = TOO_LARGE
    before, rate, found.stayed = weights(learner), learner._engine._schedule.last_epoch, True
    while not found.overflows or found.overflows[-1]["skipped"]:
        found.overflows.append(learner.train_step(STEPS + 1, batch()).metrics)
        if found.overflows[-1]["skipped"]:
            unmoved = learner._engine._schedule.last_epoch == rate
            found.stayed = found.stayed and same(weights(learner), before) and unmoved
    found.moved = not same(weights(learner), before)


def resume(learner: Any, found: Trained, place: dict[str, Any], stage: int, model: Path, out: Path) -> None:
    learner.save(out)
    for follower in (learner, learner, make(place, stage, "float16", model, out)):
        if found.resumed:
            follower.load(out)
        scale = follower._engine._scale.value
        found.resumed.append((scale, follower.train_step(STEPS + 2, batch()).loss))
    if stage:
        other = make(place, stage, "float32", model, out)
        other.load(out)
        optimizer = other._engine._engine.optimizer
        found.elsewhere = (other.train_step(STEPS + 2, batch()).loss, float(optimizer.loss_scale))


def refuse(learner: Any, found: Trained, out: Path) -> None:
    # A gradient that no scale can mend, and a loss that is none.
    learner._engine._engine.optimizer.loss_scale = 1.0
    heavy = [weighted(item, 1e9) for item in batch()]
    for items in (heavy, batch(reference=float("nan"))):
        learner.load(out)
        learner._engine._engine.optimizer.loss_scale = 1.0
        try:
            learner.train_step(STEPS + 2, items)
        except NonFiniteLossError as error:
            found.refusals.append(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=0)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Training on so many ranks with a stage in a format, each once."""
    out = tmp_path_factory.mktemp("runs")
    with RankProcesses(1) as one, RankProcesses(2) as two:

        @functools.cache
        def trained(ranks: int, stage: int, precision: str) -> Trained:
            folder = out / f"{ranks}-{stage}-{precision}"
            folder.mkdir()
            found: Trained = {1: one, 2: two}[ranks].run(train, stage, precision, model, folder)[0]
            return found

        yield trained


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_those_of_float32_and_overflows_cost_a_step(run: Run, ranks: int, stage: int) -> None:
    exact, found = run(1, 0, "float32"), run(ranks, stage, "float16")
    assert found.losses == pytest.approx(exact.losses, abs=5e-3)
    assert found.losses[0] > found.losses[-1]
    assert found.norms == pytest.approx(exact.norms, rel=2e-2), "without the scale, on all ranks"
    if found.moment:
        assert exact.norms[0] > CLIP and found.moment == pytest.approx(exact.moment, rel=2e-2), "clipped to the same"
    assert (found.first_scale, found.last_scale) == (2.0**16, 2048.0)
    *skipped, taken = found.overflows
    assert skipped and all(step["skipped"] == 1 and step["grad_norm"] == 0 for step in skipped)
    assert [step["loss_scale"] for step in found.overflows] == [TOO_LARGE / 2**n for n in range(len(found.overflows))]
    assert taken["skipped"] == 0 and 0 < taken["grad_norm"] < float("inf")
    assert found.stayed and found.moved
    itself, again, new = found.resumed
    assert itself == again == new and itself[0] == taken["loss_scale"]
    if stage:
        assert found.elsewhere == (pytest.approx(itself[1], abs=5e-3), 1.0), "float32 goes on from it, unscaled"
    gradient, loss = found.refusals
    assert "the gradient at loss scale 1 is not finite; no weight was changed" in gradient
    assert "the loss is not finite; no weight was changed" in loss
    mended = "or set learner.precision: float32, for float16 ends at 65504"
    assert gradient.endswith(mended) and loss.endswith(mended)


def train_all_kinds(place: dict[str, Any], model: Path, out: Path) -> dict[str, list[dict[str, float]]]:
    """Metrics of three steps of each kind of learner, from a scale that it cannot keep."""
    from pilaf_ray.engines.reward_learner import RewardLearner

    pretend_float16_units()
    found: dict[str, list[dict[str, float]]] = {}
    adapters = LoraSettings(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "down_proj"))
    for name, lora in (("adapters", adapters), ("4 bits", replace(adapters, quantise="nf4"))):
        learner = make(place, 2, "float16", model, out, lora=lora)
        found[name] = [learner.train_step(step, batch()).metrics for step in (1, 2, 3)]
    reward = RewardLearner(
        **place,
        model_path=str(model),
        policy_path=str(model),
        zero_stage=0,
        precision="float16",
        learning_rate=1e-3,
        micro_batch_tokens=48,
        dump_folder=out,
    )
    reward._engine._engine.optimizer.loss_scale = 2.0**40
    steps = [reward.train_step(batch()) for _ in (1, 2, 3)]
    found["reward"] = [{"skipped": float(s.skipped), "loss_scale": s.loss_scale or 0.0, "loss": s.loss} for s in steps]
    ppo = make_rollout_learner("ppo", place, model, out, precision="float16", zero_stage=1)
    ppo._policy._engine.optimizer.loss_scale, ppo._value._engine.optimizer.loss_scale = 2.0**10, 2.0**40
    found["ppo"] = [ppo.train_rollouts(step, rollouts()).metrics for step in (1, 2, 3)]
    return found


def test_every_kind_of_learner_trains_in_float16(model: Path, tmp_path: Path) -> None:
    make_tiny_reward_model(model, model.parent / "critic")
    with RankProcesses(1) as alone:
        found = alone.run(train_all_kinds, model, tmp_path)[0]
    for name in ("adapters", "4 bits"):
        assert [step["skipped"] for step in found[name]] == [0, 0, 0], name
        assert found[name][-1]["margin"] > found[name][0]["margin"], name
    assert [(step["skipped"], step["loss_scale"]) for step in found["reward"]] == [(1, 2.0**n) for n in (40, 39, 38)]
    assert len({step["loss"] for step in found["reward"]}) == 1, "no weight has changed"
    # Two epochs of two optimiser steps: four of each network in a step.
    assert [step["skipped"] for step in found["ppo"]] == [0, 0, 0]
    assert [step["value_skipped"] for step in found["ppo"]] == [4, 4, 4]
    assert [step["value_loss_scale"] for step in found["ppo"]] == [2.0**n for n in (37, 33, 29)]
    assert all(step["value_grad_norm"] == 0 and step["grad_norm"] > 0 for step in found["ppo"])


def train_spread(place: dict[str, Any], model: Path, out: Path, stage: int, spread: dict[str, Any]) -> Trained:
    pretend_float16_units()
    learner, found = make(place, stage, "float16", model, out, **spread), Trained()
    for step in range(1, STEPS + 1):
        found.losses.append(learner.train_step(step, batch()).loss)
    overflow(learner, found)
    return found


@pytest.mark.parametrize(
    ("stage", "spread"),
    [
        (2, {"sequence_parallel": 2}),
        (2, {"offload": OffloadSettings(optimizer="cpu")}),
        (3, {"offload": OffloadSettings(optimizer="cpu", parameters="cpu")}),
        (3, {"hybrid_ranks": 2}),
    ],
    ids=["rows in halves", "optimizer on the host", "all on the host", "hybrid"],
)
def test_learners_may_be_spread_in_float16(
    run: Run, model: Path, tmp_path: Path, stage: int, spread: dict[str, Any]
) -> None:
    exact = run(1, 0, "float32")
    with RankProcesses(2) as two:
        found = two.run(train_spread, model, tmp_path, stage, spread)[0]
    assert found.losses == pytest.approx(exact.losses, abs=5e-3)
    assert found.overflows[0]["skipped"] == 1 and found.overflows[-1]["skipped"] == 0
    assert found.stayed and found.moved


def refused(place: dict[str, Any], model: Path, out: Path) -> str:
    try:
        make(place, 2, "float16", model, out)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.skipif(cpu_has_float16(), reason="this machine's CPU has fp16 units")
def test_a_rank_without_units_refuses_before_it_loads_a_model(model: Path, tmp_path: Path) -> None:
    with RankProcesses(1) as alone:
        line = alone.run(refused, model.parent / "nowhere", tmp_path)[0]
    assert line.startswith("learner.precision: float16 is not trained on this node") and "\n" not in line
