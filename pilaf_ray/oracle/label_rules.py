"""From two rewards to P(a ≻ b)."""

import math
import random
from typing import Protocol


def sigmoid(x: float) -> float:
    """1 / (1 + e^−x), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


class LabelRule(Protocol):
    """Turns a reward difference into a label."""

    def __call__(self, difference: float, seed: int) -> float:
        """P(a ≻ b) in [0, 1] for reward_a − reward_b; ``seed`` belongs to the pair."""
        ...


class BradleyTerryRule:
    """A hard label, drawn with probability σ(difference / temperature)."""

    def __init__(self, *, temperature: float = 1.0) -> None:
        self._temperature = temperature

    def __call__(self, difference: float, seed: int) -> float:
        wins = random.Random(seed).random() < sigmoid(difference / self._temperature)
        return 1.0 if wins else 0.0


class ArgmaxRule:
    """The higher reward wins; equal rewards are a tie."""

    def __call__(self, difference: float, seed: int) -> float:
        return 0.5 if difference == 0 else float(difference > 0)


class SoftRule:
    """The Bradley–Terry probability itself."""

    def __call__(self, difference: float, seed: int) -> float:
        return sigmoid(difference)


def make_label_rule(*, type: str, temperature: float = 1.0) -> LabelRule:
    """The rule that ``label_rule.type`` names."""
    if type == "bradley_terry":
        return BradleyTerryRule(temperature=temperature)
    return ArgmaxRule() if type == "argmax" else SoftRule()
