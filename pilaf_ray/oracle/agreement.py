"""How far annotators agree: with each other, and with answers that are known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from krippendorff import alpha

from pilaf_ray.oracle.aggregation import CLASSES, side


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatorAgreement:
    """Cohen's κ of one annotator with all others, over the pairs that both judged."""

    annotator: str
    kappa: float | None
    """None where nobody shares a pair with them, or everyone gave one and the same answer."""
    shared: int


def cohen_kappa(answers: Sequence[tuple[int, int]]) -> float | None:
    """κ = (observed − expected) / (1 − expected) agreement of two raters; None where it is not defined.

    Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    if not answers:
        return None
    n = len(answers)
    observed = sum(a == b for a, b in answers) / n
    kinds = {kind for pair in answers for kind in pair}
    expected = sum(sum(a == k for a, _ in answers) * sum(b == k for _, b in answers) / n**2 for k in kinds)
    return None if expected == 1 else (observed - expected) / (1 - expected)


def agreement_by_annotator(votes: Mapping[str, Mapping[str, float]]) -> list[AnnotatorAgreement]:
    """κ of each annotator against every other one's answers to the same pairs, by the side taken.

    Args:
        votes: pair → annotator → P(a ≻ b).
    """
    names = sorted({name for given in votes.values() for name in given})
    found = []
    for name in names:
        shared = [
            (side(given[name]), side(vote))
            for given in votes.values()
            if name in given
            for other, vote in given.items()
            if other != name
        ]
        found.append(AnnotatorAgreement(annotator=name, kappa=cohen_kappa(shared), shared=len(shared)))
    return found


def krippendorff_alpha(votes: Mapping[str, Mapping[str, float]]) -> float | None:
    """Krippendorff's α (ordinal: b, neither, a) over all pairs; None where it is not defined.

    From 0.8 on labels are held to be reliable, below 0.667 not even for tentative conclusions.
    """
    names = sorted({name for given in votes.values() for name in given})
    shared = [given for given in votes.values() if len(given) > 1]
    if not shared:
        return None
    table = np.full((len(names), len(shared)), np.nan)
    for column, given in enumerate(shared):
        for name, vote in given.items():
            table[names.index(name), column] = side(vote)
    if len(np.unique(table[~np.isnan(table)])) < 2:
        return None
    return float(alpha(reliability_data=table, level_of_measurement="ordinal", value_domain=list(range(CLASSES))))
