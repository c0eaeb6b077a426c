"""log π_ref of what the generators already scored: sampling from a mixture runs the reference at every token.

So a mixed pair needs no second forward of the reference, and PILAF's extra forward inside the
sampler is one that the loss would have asked for anyway.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from pilaf_ray.pipeline.ports import ReferencePort, SequenceScorer
from pilaf_ray.types import ReferenceLogprobs, ResponsePair, SampledResponse


class ScoringReference(ReferencePort, SequenceScorer, Protocol):
    """A reference model that also scores single responses."""


class ReusingReference:
    """Asks ``reference`` only for responses that were sampled without it.

    Both numbers are log-probabilities of the same tokens under the same weights; they differ by the
    rounding of two implementations (within 1e-3 a token in fp32).
    """

    def __init__(self, reference: ScoringReference) -> None:
        self._reference = reference

    async def score(self, pairs: Sequence[ResponsePair]) -> list[ReferenceLogprobs]:
        """Sequence log-probabilities of both sides of each pair, in order."""
        unknown = [pair for pair in pairs if _known(pair.a) is None and _known(pair.b) is None]
        half_known = [pair for pair in pairs if (_known(pair.a) is None) != (_known(pair.b) is None)]
        scored, lone = await asyncio.gather(self._both_sides(unknown), self._missing_sides(half_known))
        whole, single = iter(scored), iter(lone)
        found = []
        for pair in pairs:
            a, b = _known(pair.a), _known(pair.b)
            if a is None and b is None:
                found.append(next(whole))
                continue
            a, b = (next(single) if value is None else value for value in (a, b))
            found.append(ReferenceLogprobs(pair_id=pair.plan.pair_id, a=a, b=b))
        return found

    async def _both_sides(self, pairs: list[ResponsePair]) -> list[ReferenceLogprobs]:
        return await self._reference.score(pairs) if pairs else []

    async def _missing_sides(self, pairs: list[ResponsePair]) -> list[float]:
        """Of the one side of each pair that is not known, in order."""
        if not pairs:
            return []
        sides = [(pair, pair.b if _known(pair.a) is not None else pair.a) for pair in pairs]
        items = [(pair.plan.prompt.token_ids, side.token_ids) for pair, side in sides]
        return await self._reference.score_responses(items, pairs=[pair.plan.pair_id for pair in pairs])


def _known(response: SampledResponse) -> float | None:
    """log π_ref of the response, where the sampler saw it."""
    return None if response.reference_logprobs is None else sum(response.reference_logprobs)
