"""The reward model's diet and its health, with a hand-written r̂ and store."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pairs import label, pair, reference
from torchmetrics.functional.regression import r2_score

from pilaf_ray.errors import RewardModelError
from pilaf_ray.evaluation.reward_quality import Judgement, RewardQuality, brier_skill
from pilaf_ray.losses.bradley_terry import calibration_error, pair_accuracy
from pilaf_ray.observability.metrics import definition_of
from pilaf_ray.pipeline.replay import ReplayWindow
from pilaf_ray.pipeline.reward_trainer import RewardTrainer
from pilaf_ray.sampling.identity import is_held_out
from pilaf_ray.store.ledger import PreferenceLedger
from pilaf_ray.types import LabeledPair, RewardScores, RewardStepResult, ScoringItem


def labeled(index: int, probability: float = 1.0) -> LabeledPair:
    return LabeledPair(pair=pair(index), label=label(index, probability), reference=reference(index))


def test_every_pair_has_one_turn_before_any_has_two_and_none_has_more_than_its_uses() -> None:
    window = ReplayWindow(window_pairs=100, uses=2)
    window.add([labeled(index) for index in (4, 2, 0, 3, 1)])
    taken = []
    while (batch := window.take(2)) is not None:
        taken += [(item.pair.plan.index, uses) for item, uses in batch]
    assert taken == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (0, 2), (1, 2), (2, 2), (3, 2), (4, 2)]
    window.add([labeled(5), labeled(0)])
    assert window.take(2) is None, "a pair that comes again keeps its uses"
    window.add([labeled(6)])
    assert [item.pair.plan.index for item, _ in window.take(2) or []] == [5, 6]


def test_the_window_is_the_newest_pairs_in_plan_order() -> None:
    window = ReplayWindow(window_pairs=3, uses=9)
    window.add([labeled(index) for index in (7, 1, 5)])
    window.add([labeled(index) for index in (6, 0)])
    assert [item.pair.plan.index for item, _ in window.take(3) or []] == [5, 6, 7]


class Rewards:
    """r̂ of a response is the length of its text; what it trained on is written down."""

    def __init__(self, scale: float = 1.0) -> None:
        self.version, self.scale = 0, scale
        self.trained: list[str] = []
        self.scored = 0

    async def score(self, items: Sequence[ScoringItem]) -> RewardScores:
        self.scored += len(items)
        return RewardScores(version=self.version, values=tuple(self.scale * len(item.text) for item in items))

    async def train_step(self, batch: Sequence[LabeledPair]) -> RewardStepResult:
        self.trained += [item.pair_id for item in batch]
        self.version += 1
        margins = tuple(self.scale * (len(i.pair.a.text) - len(i.pair.b.text)) for i in batch)
        return RewardStepResult(version=self.version, loss=0.5, margins=margins, grad_norm=2.0)

    async def save(self, folder: Path) -> None:
        (folder / "version").write_text(str(self.version))

    async def load(self, folder: Path) -> None:
        self.version = int((folder / "version").read_text())


class Store:
    """The real ledger, awaited."""

    def __init__(self, path: Path) -> None:
        self.ledger = PreferenceLedger(f"sqlite:///{path}")

    async def record_reward_uses(self, step: int, pair_ids: Sequence[str]) -> None:
        self.ledger.record_reward_uses(step, pair_ids)

    async def reward_window(self, window_pairs: int, held_out: float) -> list[tuple[LabeledPair, int]]:
        return self.ledger.reward_window(window_pairs, held_out)


def trainer(
    rewards: Rewards, store: Store, *, health: int = 32, stop: bool = False, warnings: list[str] | None = None
) -> RewardTrainer:
    return RewardTrainer(
        reward=rewards,
        store=store,
        quality=RewardQuality(window_pairs=health, min_spread=1e-3, max_spread=50.0),
        window_pairs=16,
        uses=3,
        held_out=0.25,
        batch_pairs=4,
        steps_per_batch=2,
        stop_when_unhealthy=stop,
        warn=lambda step, text: (warnings if warnings is not None else []).append(f"{step}: {text}"),
    )


def batch(step: int, probability: float = 1.0) -> list[LabeledPair]:
    items = []
    for index in range(8 * (step - 1), 8 * step):
        sampled = pair(index, a="a" * (3 + index % 2), b="bbb" + "b" * (index % 3 == 2))
        items.append(LabeledPair(pair=sampled, label=label(index, probability), reference=reference(index)))
    return items


async def feed(fed: RewardTrainer, store: Store, step: int, items: Sequence[LabeledPair]) -> dict[str, float]:
    """A step as the controller takes it: labelled, taken in, trained."""
    to_ledger(store, items)
    figures = await fed.take_in(step, items)
    store.ledger.mark_trained(step, [item.pair_id for item in items])
    return figures


def to_ledger(store: Store, items: Sequence[LabeledPair]) -> None:
    store.ledger.add_plans([item.pair.plan for item in items])
    store.ledger.add_responses([item.pair for item in items])
    store.ledger.add_labels([item.label for item in items], [item.reference for item in items])


async def test_steps_that_float16_skips_are_counted(tmp_path: Path) -> None:
    class Scaled(Rewards):
        async def train_step(self, batch: Sequence[LabeledPair]) -> RewardStepResult:
            taken, first = await super().train_step(batch), self.version == 1
            scale = 2048.0 if first else 1024.0
            return replace(taken, skipped=first, loss_scale=scale, grad_norm=0.0 if first else 2.0)

    store = Store(tmp_path / "l.db")
    figures = await feed(trainer(Scaled(), store), store, 1, batch(1))
    assert {key: figures[f"reward_model/{key}"] for key in ("steps", "skipped", "loss_scale", "grad_norm")} == {
        "steps": 2.0, "skipped": 1.0, "loss_scale": 1024.0, "grad_norm": 2.0,
    }  # fmt: skip
    assert all(definition_of(key) for key in figures)


async def test_held_out_pairs_are_judged_and_never_trained_on_and_uses_are_bounded(tmp_path: Path) -> None:
    rewards, store = Rewards(), Store(tmp_path / "l.db")
    fed = trainer(rewards, store)
    held = [item.pair_id for step in range(1, 21) for item in batch(step) if is_held_out(item.pair_id, 0.25)]
    assert 20 <= len(held) <= 60, "a quarter of 160, by identity"
    for step in range(1, 21):
        await feed(fed, store, step, batch(step))
    uses = Counter(rewards.trained)
    assert not set(held) & set(uses)
    assert rewards.scored == 2 * len(held)
    assert max(uses.values()) <= 3 and len(rewards.trained) == 20 * 2 * 4


async def test_a_resumed_diet_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, store = Rewards(), Store(tmp_path / "whole.db")
    fed = trainer(whole, store)
    figures = {}
    for step in range(1, 7):
        figures[step] = await feed(fed, store, step, batch(step))
        assert all(definition_of(key) for key in figures[step])
    expected = whole.trained

    first, store = Rewards(), Store(tmp_path / "cut.db")
    fed = trainer(first, store)
    for step in range(1, 6):
        if step == 4:
            trained_at_checkpoint = list(first.trained)
            (tmp_path / "reward").mkdir()
            await fed.save(tmp_path / "reward")
        await feed(fed, store, step, batch(step))
    store.ledger.reset_after(3)
    second = Rewards()
    resumed = trainer(second, store)
    await resumed.load(tmp_path / "reward")
    for step in (4, 5, 6):
        assert await feed(resumed, store, step, batch(step)) == figures[step]
    assert trained_at_checkpoint + second.trained == expected


async def test_ties_only_are_named_and_stop_the_run_if_asked(tmp_path: Path) -> None:
    warnings: list[str] = []
    store = Store(tmp_path / "a.db")
    warned = trainer(Rewards(), store, warnings=warnings)
    for step in range(1, 12):
        figures = await feed(warned, store, step, batch(step, probability=0.5))
    assert figures["reward_model/ties"] == 1.0 and figures["reward_model/accuracy"] == 0.5
    assert len(warnings) == 1 and "all ties" in warnings[0]
    store = Store(tmp_path / "b.db")
    stopped = trainer(Rewards(), store, stop=True)
    with pytest.raises(RewardModelError, match=r"step \d+: .* all ties"):
        for step in range(1, 12):
            await feed(stopped, store, step, batch(step, probability=0.5))


@pytest.mark.parametrize(("scale", "word"), [(1e-5, "collapsed to a constant"), (1e6, "diverges")])
async def test_collapse_and_divergence_are_found(tmp_path: Path, scale: float, word: str) -> None:
    warnings: list[str] = []
    store = Store(tmp_path / "l.db")
    fed = trainer(Rewards(scale), store, warnings=warnings)
    for step in range(1, 12):
        await feed(fed, store, step, batch(step))
    assert len(warnings) == 1 and word in warnings[0]


def test_quality_is_that_of_the_tensor_functions_and_worse_than_chance_is_said() -> None:
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(200, generator=generator)
    probabilities = torch.rand(200, generator=generator)
    probabilities[:20] = 0.5
    quality = RewardQuality(window_pairs=200, min_spread=0.0, max_spread=9.0)
    quality.add([Judgement(m, p) for m, p in zip(margins.tolist(), probabilities.tolist(), strict=True)], held_out=True)
    found = quality.metrics()
    assert found["reward_model/accuracy"] == pytest.approx(float(pair_accuracy(margins, probabilities).mean()))
    # torchmetrics sees the preferred side only, ten bins from ½ to 1; both orders, ten bins from 0 to 1, need five.
    expected = float(calibration_error(margins, probabilities, bins=5))
    assert found["reward_model/held_out_calibration_error"] == pytest.approx(expected, abs=1e-5)
    assert found["reward_model/spread"] == pytest.approx(float(margins.square().mean().sqrt()), rel=1e-5)
    # scikit-learn's and torchmetrics' R² with ½ for the mean: both orders of each pair have that mean.
    chances, both = torch.sigmoid(torch.cat([margins, -margins])), torch.cat([probabilities, 1.0 - probabilities])
    assert found["reward_model/held_out_brier_skill"] == pytest.approx(float(r2_score(chances, both)), abs=1e-5)
    assert quality.complaint() is None
    quality.add([Judgement(1.0, float(n % 3 == 0)) for n in range(200)], held_out=False)
    assert "below chance" in str(quality.complaint())


def test_brier_skill_praises_neither_a_coin_nor_an_over_confident_judge() -> None:
    labels = [1.0, 1.0, 1.0, 0.0]
    calibrated = brier_skill([Judgement(math.log(3.0), p) for p in labels])
    assert calibrated == pytest.approx(1 - (3 / 16 + 9 / 16) / 1.0)
    assert brier_skill([Judgement(0.0, p) for p in labels]) == 0.0
    assert brier_skill([Judgement(20.0, p) for p in labels]) == pytest.approx(0.0, abs=1e-6)
    assert brier_skill([Judgement(20.0, p) for p in (1.0, 0.0, 0.0, 0.0)]) == pytest.approx(-2.0, abs=1e-6)
    assert math.isnan(brier_skill([Judgement(1.0, 0.5)]))


def test_uses_are_counted_once_however_often_a_step_is_repeated(tmp_path: Path) -> None:
    store = Store(tmp_path / "l.db")
    items = batch(1)
    to_ledger(store, items)
    store.ledger.mark_trained(1, [item.pair_id for item in items])
    names = [item.pair_id for item in items]
    for _ in range(2):
        store.ledger.record_reward_uses(1, [*names, names[0]])
    store.ledger.record_reward_uses(2, names[:1])
    uses = {item.pair_id: count for item, count in store.ledger.reward_window(100, 0.0)}
    assert uses == {name: 3 if name == names[0] else 1 for name in names}
    store.ledger.roll_back(1)
    assert dict(Counter(count for _, count in store.ledger.reward_window(100, 0.0))) == {2: 1, 1: 7}
    assert [item.pair.plan.index for item, _ in store.ledger.reward_window(3, 0.0)] == [5, 6, 7]
