"""How often the policy's tokens are kept by the mixtures, and how far ahead it pays to draft."""

from torch import Tensor

MEMORY = 512
"""Judged drafts that the running rate of kept ones remembers."""
REFERENCE_COST = 0.3
"""What a reference forward costs beyond its tokens (reading the weights), in forwards of both networks over a token a
request. It only decides windows, which change no response. An estimate from docs/performance.md, not a measurement."""


class DraftCounter:
    """Counts of one engine since its start, over mixed requests that are drawn."""

    def __init__(self) -> None:
        self.drafted = 0
        self.judged = 0
        self.passes = 0
        # Added up where it is computed: a GPU need not be waited for at every step.
        self._kept: Tensor | int = 0
        self._rate = 1.0
        self._seen = (0, 0)

    def add(self, *, drafted: int, judged: int, kept: Tensor, passes: int) -> None:
        """One step; ``kept`` is said of each judged draft. See :class:`pilaf_ray.types.DraftCounts`."""
        self.drafted += drafted
        self.judged += judged
        self.passes += passes
        self._kept = self._kept + kept.sum()

    @property
    def kept(self) -> int:
        """Judged drafts that were kept."""
        return int(self._kept)

    def rate(self) -> float:
        """Running share of kept drafts among judged ones; 1 at first, as it is at θ = ref, where a run begins."""
        judged, kept = self.judged, self.kept
        new = judged - self._seen[0]
        if new:
            self._rate += min(1.0, new / MEMORY) * ((kept - self._seen[1]) / new - self._rate)
            self._seen = (judged, kept)
        return self._rate


def best_window(rate: float, *, limit: int) -> int:
    """How many tokens to draft before the reference is asked, 1 to ``limit``.

    Of w drafts that are kept with probability a each, (1 − a^w)/(1 − a) are judged on average; a step costs
    w + REFERENCE_COST. The window with the cheapest token is taken.
    """
    gains = (sum(rate**ahead for ahead in range(window)) for window in range(1, limit + 1))
    costs = [(window + REFERENCE_COST) / gain for window, gain in enumerate(gains, start=1)]
    return 1 + costs.index(min(costs))
