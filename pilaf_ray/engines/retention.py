"""Which checkpoints stay."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionPolicy:
    """The newest ``last``, the ``best`` by score, and those at multiples of ``every``.

    Example: ``RetentionPolicy(last=1, best=1).kept([5, 10, 15], newest=15, scores={5: 0.9, 10: 0.2})`` is ``{5, 15}``
    """

    last: int
    best: int = 0
    every: int | None = None

    def kept(
        self, steps: Collection[int], *, newest: int, scores: Mapping[int, float], serving: int | None = None
    ) -> set[int]:
        """Those of ``steps`` that stay; all others may be removed.

        Args:
            newest: the checkpoint that was just written and is known to be whole. Steps after it are of an
                attempt that was rolled back, because their checkpoints did not verify: none of them stays, and
                none takes the place of a good one.
            scores: what is known of steps, higher is better; of equals the later one is better.
            serving: the step that generators sample from until the end of a round.
        """
        assert self.last >= 1, "the newest checkpoint always stays"
        ordered = sorted(step for step in steps if step <= newest)
        judged = sorted((step for step in ordered if step in scores), key=lambda step: (scores[step], step))
        best = judged[-self.best :] if self.best else []
        multiples = [step for step in ordered if self.every and step % self.every == 0]
        served = [step for step in ordered if step == serving]
        return {*ordered[-self.last :], *best, *multiples, *served}
