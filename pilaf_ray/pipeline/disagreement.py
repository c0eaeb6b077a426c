"""How far the heads of the reward model are apart on a pair."""

import statistics

from pilaf_ray.pipeline.ports import RewardScorer
from pilaf_ray.types import ResponsePair, ScoringItem


class HeadDisagreement:
    """Standard deviation over the heads of r̂(a) − r̂(b), in log-odds.

    Of the difference and not of single scores: a constant that one head gives every response to a prompt is no
    opinion about which is better.
    """

    def __init__(self, reward: RewardScorer) -> None:
        self._reward = reward

    async def __call__(self, pair: ResponsePair) -> float:
        """One forward of r̂ for each side, under whatever version it has now."""
        prompt = pair.plan.prompt
        items = [ScoringItem(prompt=prompt, token_ids=y.token_ids, text=y.text) for y in (pair.a, pair.b)]
        a, b = (await self._reward.score(items)).heads
        return statistics.pstdev(x - y for x, y in zip(a, b, strict=True))
