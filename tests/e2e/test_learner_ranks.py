"""A checkpoint of one number of ranks goes on in another as if nothing had happened."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from float16_units import pretend_float16_units
from learner_batches import batch
from rank_processes import RankProcesses

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.lora_checks import LoraSettings
from pilaf_ray.engines.other_ranks import saved_ranks


@dataclass(frozen=True)
class Case:
    """A learner that is saved after three steps and takes two more, there and elsewhere."""

    kind: str
    zero_stage: int
    precision: str = "float32"

    def folder(self, out: Path, ranks: int) -> Path:
        return out / f"{self.kind}-{self.zero_stage}-{self.precision}-by-{ranks}"


CASES = [
    *(Case("policy", stage) for stage in (0, 1, 2, 3)),
    # Two groups of parameters with learning rates of their own, and parameters that are not trained.
    Case("reward", 3),
    Case("policy", 2, "bfloat16"),
    # With a loss scale, which is part of the checkpoint.
    *(Case("policy", stage, "float16") for stage in (1, 3)),
    # Adapters: weights that are not trained are in no checkpoint.
    *(Case("adapters", stage) for stage in (2, 3)),
]


@dataclass
class Taken:
    """Two steps: what a rank saw of them."""

    losses: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    scale: float = 0.0
    """Of the losses of the two; 0 but in float16."""


def make(case: Case, place: dict[str, Any], model: Path, out: Path) -> Any:
    from pilaf_ray.engines.learner import PolicyLearner
    from pilaf_ray.engines.reward_learner import RewardLearner

    pretend_float16_units()
    common = {
        **place,
        "model_path": str(model),
        "zero_stage": case.zero_stage,
        "precision": case.precision,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "micro_batch_tokens": 48,
        "dump_folder": out,
    }
    if case.kind == "reward":
        return RewardLearner(policy_path=str(model), head_learning_rate=3e-3, trainable_layers=1, **common)
    if case.kind == "adapters":
        common["lora"] = LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj", "down_proj"))
    return PolicyLearner(loss="dpo", beta=0.1, label_smoothing=0.0, lr_schedule="linear", total_steps=20, **common)


def lower_scale(case: Case, learner: Any) -> None:
    """A scale that no learner begins with."""
    if case.precision == "float16":
        learner._engine._engine.optimizer.loss_scale = 2.0**9


def step(case: Case, learner: Any, number: int) -> float:
    if case.kind == "reward":
        return float(learner.train_step(batch()).loss)
    return float(learner.train_step(number, batch()).loss)


def two_steps(case: Case, learner: Any) -> Taken:
    scale = learner._engine._scale
    taken = Taken(scale=0.0 if scale is None else scale.value)
    for number in (4, 5):
        taken.rates.append([group["lr"] for group in learner._engine._engine.optimizer.param_groups])
        taken.losses.append(step(case, learner, number))
    taken.weights = {name: tensor.clone() for name, tensor in learner._engine.named_weights()}
    return taken


Outcome = dict[Case, Taken]


def train(place: dict[str, Any], model: Path, out: Path) -> Outcome:
    """Train and save every case, and go on."""
    whole = {}
    for case in CASES:
        learner = make(case, place, model, out)
        lower_scale(case, learner)
        for number in (1, 2, 3):
            step(case, learner, number)
        folder = case.folder(out, place["world_size"])
        folder.mkdir(exist_ok=True)
        learner.save(folder)
        whole[case] = two_steps(case, learner)
    return whole


def resume(place: dict[str, Any], model: Path, out: Path) -> Outcome:
    """Go on from what the other group saved."""
    resumed = {}
    for case in CASES:
        learner = make(case, place, model, out)
        saved = case.folder(out, 3 - place["world_size"])
        learner.load(saved)
        step(case, learner, 4)
        # As after a rollback: what is loaded does not depend on what was there.
        learner.load(saved)
        resumed[case] = two_steps(case, learner)
    return resumed


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Outcome, Outcome]]:
    """By number of ranks: (left alone, resumed from the other number's checkpoint)."""
    out = tmp_path_factory.mktemp("ranks")
    make_tiny_llama(out / "model", seed=0)
    with RankProcesses(1) as one, RankProcesses(2) as two:
        whole, resumed = (
            [ended()[0] for ended in [group.start(work, out / "model", out) for group in (one, two)]]
            for work in (train, resume)
        )
    for case in CASES:
        for ranks in (1, 2):
            saved = case.folder(out, ranks)
            assert saved_ranks(saved) == ranks
            assert not (saved / "universal").exists(), "the whole tensors are gone again"
    return {1: (whole[0], resumed[0]), 2: (whole[1], resumed[1])}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-zero{case.zero_stage}-{case.precision}")
def test_another_number_of_ranks_goes_on_as_if_nothing_had_happened(
    outcomes: dict[int, tuple[Outcome, Outcome]], before: int, after: int, case: Case
) -> None:
    expected, found = outcomes[before][0][case], outcomes[after][1][case]
    tolerance = 1e-5 if case.precision == "float32" else 1e-2
    assert found.scale == expected.scale == (2.0**9 if case.precision == "float16" else 0.0)
    assert found.rates == [pytest.approx(rates) for rates in expected.rates]
    gaps = {name: float((found.weights[name] - expected.weights[name]).abs().max()) for name in expected.weights}
    assert found.losses == pytest.approx(expected.losses, abs=tolerance)
    assert max(gaps.values()) < tolerance, gaps
