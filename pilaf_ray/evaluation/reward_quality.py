"""How well r̂ tracks the oracle, on pairs that it had not trained on when it judged them."""

import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from pilaf_ray.evaluation.measures import calibration_error
from pilaf_ray.evaluation.statistics import mean

CHANCE_ERRORS = 3.0
"""Accuracy counts as below chance when it is so many standard errors under ½."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """r̂'s margin r̂(a) − r̂(b) of a pair that was new to it, and the oracle's P(a ≻ b)."""

    margin: float
    probability: float

    @property
    def agrees(self) -> float:
        """1 where the signs agree, 0 where not, ½ for a tie of either."""
        sides = (self.margin > 0) - (self.margin < 0), (self.probability > 0.5) - (self.probability < 0.5)
        return 0.5 * (1.0 + sides[0] * sides[1])


@dataclass(slots=True)
class RewardQuality:
    """Rolling figures over the newest ``window_pairs`` judgements of each kind.

    *Held-out* pairs are never trained on; *fresh* ones are these and all others at their first
    use, judged before the step. Fresh ones are ten times as many; the two drift apart only if
    replay over-fits to the prompts.

    Args:
        window_pairs: nothing is judged unhealthy before there are so many fresh pairs.
        min_spread: of the margins, in log-odds; below it r̂ has collapsed.
        max_spread: above it r̂ has diverged.
    """

    window_pairs: int
    min_spread: float
    max_spread: float
    fresh: deque[Judgement] = field(init=False)
    held_out: deque[Judgement] = field(init=False)

    def __post_init__(self) -> None:
        """Both windows start empty."""
        self.fresh = deque(maxlen=self.window_pairs)
        self.held_out = deque(maxlen=self.window_pairs)

    def add(self, judgements: Iterable[Judgement], *, held_out: bool) -> None:
        """Take in new judgements, oldest first."""
        for judgement in judgements:
            self.fresh.append(judgement)
            if held_out:
                self.held_out.append(judgement)

    def metrics(self) -> dict[str, float]:
        """Of the windows as they are; a figure that no pair gives is left out."""
        figures = {}
        if self.fresh:
            figures = {
                "reward_model/accuracy": mean([j.agrees for j in self.fresh]),
                "reward_model/calibration_error": _calibration(self.fresh),
                "reward_model/brier_skill": brier_skill(self.fresh),
                "reward_model/spread": self.spread,
                "reward_model/ties": mean([float(j.probability == 0.5) for j in self.fresh]),
            }
        if self.held_out:
            figures["reward_model/held_out_accuracy"] = mean([j.agrees for j in self.held_out])
            figures["reward_model/held_out_calibration_error"] = _calibration(self.held_out)
            figures["reward_model/held_out_brier_skill"] = brier_skill(self.held_out)
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    @property
    def spread(self) -> float:
        """Root mean square of the fresh margins: their deviation, the order of the sides being random."""
        return math.sqrt(mean([j.margin**2 for j in self.fresh]))

    def complaint(self) -> str | None:
        """What is wrong with r̂, in one line; None while all is well or too little is known."""
        count = len(self.fresh)
        if count < self.window_pairs:
            return None
        if all(j.probability == 0.5 for j in self.fresh):
            return f"the oracle's last {count} labels are all ties: there is nothing to learn; look at the oracle"
        if self.spread < self.min_spread:
            return (
                f"r̂ has collapsed to a constant: its margins on {count} new pairs spread by {self.spread:.2g}, less "
                f"than reward_model.health.min_spread = {self.min_spread:g}; lower reward_model.learning_rate"
            )
        if not self.spread <= self.max_spread:
            return (
                f"r̂ diverges: its margins on {count} new pairs spread by {self.spread:.3g}, more than "
                f"reward_model.health.max_spread = {self.max_spread:g}; lower reward_model.learning_rate or "
                "reward_model.replay.uses"
            )
        accuracy, limit = mean([j.agrees for j in self.fresh]), 0.5 - CHANCE_ERRORS * 0.5 / math.sqrt(count)
        if accuracy < limit:
            return (
                f"r̂ prefers what the oracle rejects: accuracy {accuracy:.2f} on {count} new pairs is below chance; "
                "look at the oracle's labels, or lower reward_model.learning_rate"
            )
        return None

    def state(self) -> dict[str, Any]:
        """Both windows as plain data, for a checkpoint."""
        return {
            name: [(j.margin, j.probability) for j in window]
            for name, window in (("fresh", self.fresh), ("held_out", self.held_out))
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        for name, window in (("fresh", self.fresh), ("held_out", self.held_out)):
            window.clear()
            window.extend(Judgement(margin, probability) for margin, probability in state[name])


def brier_skill(judgements: Collection[Judgement]) -> float:
    """1 − Σ(σ(margin) − p)² / Σ(½ − p)²: what r̂'s chances tell of the labels beyond a coin (Murphy 1973).

    1 is perfect, 0 says as little as ½ for every pair, and an over-confident r̂ is below 0. The calibration error
    alone praises a head that says ½ to all; this rule is proper, so only chances that are both sharp and
    calibrated raise it. NaN where every label is a tie.
    """
    chance = sum((0.5 - j.probability) ** 2 for j in judgements)
    return 1.0 - sum((_chosen(j.margin) - j.probability) ** 2 for j in judgements) / chance if chance else math.nan


def _calibration(judgements: Iterable[Judgement]) -> float:
    """Expected calibration error of σ(margin), both orders of each pair."""
    sides = [
        (sign * j.margin, j.probability if sign > 0 else 1.0 - j.probability) for j in judgements for sign in (1, -1)
    ]
    return calibration_error([_chosen(margin) for margin, _ in sides], [p for _, p in sides])


def _chosen(margin: float) -> float:
    """σ(margin), which cannot overflow."""
    return 0.5 * (1.0 + math.tanh(margin / 2.0))
