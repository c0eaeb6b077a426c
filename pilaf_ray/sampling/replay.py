"""Seeded sampling from two plain networks, by the rule that the generator follows.

One draw of |V| exponential numbers in float64 a token from the request's own generator;
the token is the argmax of probability divided by noise (a Gumbel-max draw). So a
response can be redone anywhere from its seed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    response: list[int] = []
    logprobs: list[float] = []
    while len(response) < max_new_tokens:
        row = mixed_logprobs(policy(tokens), reference(tokens), coefficient)
        noise = torch.empty(row.shape, dtype=torch.float64).exponential_(generator=generator)
        token = int((row.exp() * noise.reciprocal()).argmax())
        tokens.append(token)
        response.append(token)
        logprobs.append(float(row[token]))
        if token in end_token_ids:
            break
    return tuple(response), tuple(logprobs)
