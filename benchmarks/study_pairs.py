"""How much the labels of a run could say: what the oracle's hidden reward has to do with the pairs it was asked about.

A label is drawn with P(a ≻ b) = σ(Δ), Δ = r*(a) − r*(b). It tells 1 − H₂(σ(Δ))
bits of the sign of Δ: none of a tie, 0.47 at Δ = 2. A sampler that finds pairs further apart buys more with a label.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import entr, expit

from pilaf_ray.store.reading import LedgerReader
from pilaf_ray.types import LabeledPair

EVERY_PAIR = 1_000_000
Z_NAMES = ("plus", "minus", "product")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFigures:
    """Means over the pairs of one branch of a run."""

    pairs: int
    gap: float
    """|Δ|, in log-odds."""
    ties: float
    """Share of pairs with Δ = 0."""
    bits: float
    """What a label tells, in bits."""
    agreement: float
    """Share of the labels that prefer the better response, of pairs that are no tie."""


def pair_figures(pairs: Iterable[LabeledPair]) -> dict[str, PairFigures]:
    """The figures of each branch, and of ``all`` of them; pairs whose oracle has no rewards do not count."""
    found: dict[str, list[tuple[float, float]]] = {}
    for labeled in pairs:
        label = labeled.label
        if label.reward_a is not None and label.reward_b is not None:
            seen = label.reward_a - label.reward_b, labeled.probability
            for branch in ("all", labeled.pair.branch):
                found.setdefault(branch, []).append(seen)
    return {branch: _figures(np.array(seen)) for branch, seen in found.items()}


def run_pairs(run: Path) -> dict[str, PairFigures]:
    """:func:`pair_figures` of everything that the run in folder ``run`` was trained on."""
    reader = LedgerReader(f"sqlite:///{run / 'preferences.db'}")
    try:
        return pair_figures(reader.trained_sample(EVERY_PAIR))
    finally:
        reader.close()


def run_z(run: Path) -> dict[str, float]:
    """Means over steps of Z⁺, Z⁻ and Z⁺Z⁻ as the run in folder ``run`` estimated them; empty where it mixed nothing."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name: [line[f"z/{name}"] for line in lines if line[f"z/{name}"] is not None] for name in Z_NAMES}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def _figures(seen: np.ndarray) -> PairFigures:
    """Of (Δ, label) a pair, shape (pairs, 2)."""
    gaps, labels = seen.T
    chance = expit(gaps)
    entropy = (entr(chance) + entr(1 - chance)) / np.log(2)
    untied = gaps != 0
    right = (labels[untied] > 0.5) == (gaps[untied] > 0)
    return PairFigures(
        pairs=len(gaps),
        gap=float(np.abs(gaps).mean()),
        ties=float(1 - untied.mean()),
        bits=float((1 - entropy).mean()),
        agreement=float(right.mean()) if right.size else 0.5,
    )
