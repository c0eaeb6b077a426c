"""How a token is drawn: by inverting the distribution at one number that the request's seed fixes.

The number belongs to (seed, position) and to nothing else, so a response comes out the same
however a scheduler cuts, batches or repeats the work, and can be redone anywhere.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MANTISSA = 2.0**53


def token_uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that draws token ``position`` (from 0) of the response with ``seed``."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    # As many bits as a double holds, so that the largest number does not round up to 1.
    return (int.from_bytes(digest, "big") >> 11) / _MANTISSA


def draw_tokens(logprobs: Float[Tensor, "rows vocab"], uniforms: Sequence[float]) -> Int[Tensor, " rows"]:
    """The first token of each row at which the cumulated probability exceeds the row's number.

    A token of probability 0 is never drawn. The sum runs in fp64: in fp32 its rounding would be of
    the size of a rare token's probability.
    """
    cumulated = logprobs.double().exp().cumsum(-1)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=logprobs.device).unsqueeze(1)
    # Rounding leaves the last sum beside 1.
    return torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True).squeeze(1)
