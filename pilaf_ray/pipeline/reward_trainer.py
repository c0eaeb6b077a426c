"""The reward model's diet: labelled pairs as the policy's learner takes them in, with replay.

     batch of step k ──┬─ held out ──▶ scored, never trained on ───────┐
                       └─ others ──▶ replay window ──▶ steps of r̂ ────┴──▶ quality of r̂

The pairs of step k are taken in while the policy takes its step k, so what r̂ has seen is a
function of the step: a resumed run gives it the same pairs in the same order.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pilaf_ray.errors import RewardModelError
from pilaf_ray.evaluation.reward_quality import Judgement, RewardQuality
from pilaf_ray.pipeline.ports import RewardPort
from pilaf_ray.pipeline.replay import ReplayWindow
from pilaf_ray.sampling.identity import is_held_out
from pilaf_ray.types import LabeledPair, RewardStepResult, ScoringItem

logger = logging.getLogger(__name__)


class RewardStorePort(Protocol):
    """The part of the ledger that remembers what r̂ was trained on."""

    async def record_reward_uses(self, step: int, pair_ids: Sequence[str]) -> None:
        """One use of a pair for each time it is named; a repeat of a step changes nothing."""
        ...

    async def reward_window(self, window_pairs: int, held_out: float) -> list[tuple[LabeledPair, int]]:
        """The newest trained pairs outside the held-out share, in plan order, with their uses."""
        ...


class RewardTrainer:
    """Trains r̂ on what the policy's steps bring, and watches it.

    Args:
        window_pairs, uses: of :class:`pilaf_ray.pipeline.replay.ReplayWindow`.
        held_out: share of the pairs, by identity, that is only measured on.
        batch_pairs: pairs of one step of r̂.
        steps_per_batch: most steps of r̂ for one batch that comes in.
        stop_when_unhealthy: raise RewardModelError instead of warning once.
        warn: is given the step and what is wrong.
    """

    def __init__(
        self,
        *,
        reward: RewardPort,
        store: RewardStorePort,
        quality: RewardQuality,
        window_pairs: int,
        uses: int,
        held_out: float,
        batch_pairs: int,
        steps_per_batch: int,
        stop_when_unhealthy: bool,
        warn: Callable[[int, str], None],
    ) -> None:
        self._reward = reward
        self._store = store
        self._quality = quality
        self._window = ReplayWindow(window_pairs, uses)
        self._held_out = held_out
        self._batch_pairs = batch_pairs
        self._steps_per_batch = steps_per_batch
        self._stop_when_unhealthy = stop_when_unhealthy
        self._warn = warn
        self._complaint: str | None = None

    async def take_in(self, step: int, pairs: Sequence[LabeledPair]) -> dict[str, float]:
        """Judge, train and record the pairs of ``step``; returns metrics.

        Raises:
            RewardModelError: r̂ is of no use, where the run is to stop then.
        """
        await self._judge([pair for pair in pairs if is_held_out(pair.pair_id, self._held_out)])
        self._window.add(pair for pair in pairs if not is_held_out(pair.pair_id, self._held_out))
        used: list[str] = []
        results: list[RewardStepResult] = []
        while len(results) < self._steps_per_batch and (batch := self._window.take(self._batch_pairs)):
            result = await self._reward.train_step([item for item, _ in batch])
            first = [
                Judgement(margin, item.probability)
                for (item, uses), margin in zip(batch, result.margins, strict=True)
                if uses == 1
            ]
            self._quality.add(first, held_out=False)
            used += [item.pair_id for item, _ in batch]
            results.append(result)
        await self._store.record_reward_uses(step, used)
        self._watch(step)
        return {**self._quality.metrics(), **_step_metrics(results)}

    async def _judge(self, pairs: Sequence[LabeledPair]) -> None:
        """Score pairs that r̂ never trains on."""
        if not pairs:
            return
        sides = [(pair.pair.plan.prompt, side) for pair in pairs for side in (pair.pair.a, pair.pair.b)]
        items = [ScoringItem(prompt=prompt, token_ids=side.token_ids, text=side.text) for prompt, side in sides]
        values = (await self._reward.score(items)).values
        margins = [a - b for a, b in zip(values[0::2], values[1::2], strict=True)]
        judged = [Judgement(margin, pair.probability) for pair, margin in zip(pairs, margins, strict=True)]
        self._quality.add(judged, held_out=True)

    def _watch(self, step: int) -> None:
        complaint = self._quality.complaint()
        if complaint is not None and self._stop_when_unhealthy:
            raise RewardModelError(f"step {step}: {complaint} (reward_model.health.action: stop)")
        # Once, until it is well again: the figures of the line change with every step.
        if complaint is not None and self._complaint is None:
            logger.warning("step %d: %s", step, complaint)
            self._warn(step, complaint)
        self._complaint = complaint

    async def save(self, folder: Path) -> None:
        """r̂ and the figures of its quality; what it was trained on is in the ledger."""
        await self._reward.save(folder)
        (folder / "quality.json").write_text(json.dumps(self._quality.state()))

    async def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote; the ledger has been put back to the same step."""
        await self._reward.load(folder)
        self._quality.restore(json.loads((folder / "quality.json").read_text()))
        self._window.restore(await self._store.reward_window(self._window.window_pairs, self._held_out))


def _step_metrics(results: Sequence[RewardStepResult]) -> dict[str, float]:
    """Of r̂'s steps beside one step of the policy."""
    if not results:
        return {"reward_model/steps": 0.0}
    metrics = {
        "reward_model/loss": sum(result.loss for result in results) / len(results),
        "reward_model/grad_norm": results[-1].grad_norm,
        "reward_model/version": float(results[-1].version),
        "reward_model/steps": float(len(results)),
    }
    if (scale := results[-1].loss_scale) is not None:
        metrics["reward_model/loss_scale"] = scale
        metrics["reward_model/skipped"] = float(sum(result.skipped for result in results))
    return metrics
