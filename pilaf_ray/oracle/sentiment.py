"""The demo's gold reward: how positive a text is, by the VADER lexicon."""

from collections.abc import Sequence
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Compound sentiment of each response, in [−1, 1]; the prompts do not matter."""
    return [float(_analyzer().polarity_scores(response)["compound"]) for response in responses]
