"""Seeded sampling from two plain networks, by the rule that the generator follows.

A response can be redone anywhere from its seed (:mod:`pilaf_ray.sampling.draw`).
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from pilaf_ray.sampling.draw import draw_mixed_tokens
from pilaf_ray.sampling.interpolation import mixed_logprobs

NextLogits = Callable[[Sequence[int]], Tensor]
"""Token ids so far to next-token logits, shape (vocab,)."""


def sample_response(
    policy: NextLogits,
    reference: NextLogits,
    prompt: Sequence[int],
    *,
    coefficient: float,
    seed: int,
    max_new_tokens: int,
    end_token_ids: frozenset[int],
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Token ids of the response (end-of-sequence included) and their log-probabilities."""
    tokens = list(prompt)
    response: list[int] = []
    logprobs: list[float] = []
    while len(response) < max_new_tokens:
        logits = policy(tokens)
        row = mixed_logprobs(logits, reference(tokens), coefficient)
        own = logits.log_softmax(-1, dtype=row.dtype).unsqueeze(0)
        token = int(draw_mixed_tokens(own, row.unsqueeze(0), [seed], [len(response)]))
        tokens.append(token)
        response.append(token)
        logprobs.append(float(row[token]))
        if token in end_token_ids:
            break
    return tuple(response), tuple(logprobs)
