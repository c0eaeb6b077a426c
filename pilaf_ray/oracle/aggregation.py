"""From several people's votes on a pair to one label.

A vote is P(a ≻ b) in [0, 1], or None where the annotator found no answer worth training on.
"""

from collections.abc import Mapping, Sequence

CLASSES = 3
"""b is better, neither, a is better."""
VALUES = (0.0, 0.5, 1.0)
_FLOOR = 1e-9


def side(vote: float) -> int:
    """The class of a vote: 0 for b, 1 for neither, 2 for a."""
    return 1 if vote == 0.5 else 2 if vote > 0.5 else 0


def majority(votes: Sequence[float | None]) -> float | None:
    """The mean vote of the side that most annotators took; of all votes where no side leads.

    None, an abstention, where at least half of the annotators found no answer worth training on.

    Example: ``majority([0.9, 0.7, 0.2]) == 0.8``
    """
    given = [vote for vote in votes if vote is not None]
    if 2 * len(given) <= len(votes):
        return None
    sides = [[vote for vote in given if side(vote) == kind] for kind in range(CLASSES)]
    most = max(len(group) for group in sides)
    leading = [group for group in sides if len(group) == most]
    chosen = leading[0] if len(leading) == 1 else given
    return sum(chosen) / len(chosen)


def dawid_skene(votes: Mapping[str, Mapping[str, int]], *, rounds: int = 50) -> dict[str, tuple[float, ...]]:
    """Posterior over the classes of each item, by EM over annotators' confusion matrices.

    Dawid and Skene 1979, "Maximum likelihood estimation of observer error-rates using the EM algorithm".
    Starts from the shares of votes; each confusion row has one pseudo-count in all.

    Args:
        votes: item → annotator → class.

    Returns:
        item → probabilities of the classes, summing to 1.
    """
    posterior = {item: _shares(list(given.values())) for item, given in votes.items() if given}
    for _ in range(rounds):
        prior = [sum(p[k] for p in posterior.values()) / max(1, len(posterior)) for k in range(CLASSES)]
        confusion = _confusions(votes, posterior)
        updated = {}
        for item in posterior:
            weights = [max(_FLOOR, prior[k]) for k in range(CLASSES)]
            for annotator, given in votes[item].items():
                weights = [w * confusion[annotator][k][given] for k, w in enumerate(weights)]
            total = sum(weights)
            updated[item] = tuple(w / total for w in weights)
        moved = max((abs(a - b) for i in posterior for a, b in zip(posterior[i], updated[i], strict=True)), default=0.0)
        posterior = updated
        if moved < 1e-6:
            break
    return posterior


def _shares(given: Sequence[int]) -> tuple[float, ...]:
    return tuple(sum(vote == k for vote in given) / len(given) for k in range(CLASSES))


def _confusions(
    votes: Mapping[str, Mapping[str, int]], posterior: Mapping[str, Sequence[float]]
) -> dict[str, list[list[float]]]:
    """annotator → true class → share of each answer."""
    annotators = {annotator for given in votes.values() for annotator in given}
    counts = {annotator: [[1 / CLASSES] * CLASSES for _ in range(CLASSES)] for annotator in annotators}
    for item, belief in posterior.items():
        for annotator, given in votes[item].items():
            for k in range(CLASSES):
                counts[annotator][k][given] += belief[k]
    return {a: [[value / sum(row) for value in row] for row in table] for a, table in counts.items()}
