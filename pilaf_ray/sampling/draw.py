"""How a token is drawn: by inversion from the policy, and from a mixture by keeping or replacing the policy's token.

A token of a mixture q begins as a draft: the token x that the policy p draws. It is kept with probability
min(1, q(x)/p(x)); otherwise a token is drawn anew from what q has more of than p, max(0, q − p) normalised. What
comes out is distributed exactly as q, because p(x)·min(1, q(x)/p(x)) = min(p(x), q(x)), and the rest of q is what is
drawn anew. For q = p every draft is kept.

All numbers belong to (seed, position, purpose) and to nothing else. So the token at a position is a
function of the tokens before it, the seed and the position. How far an engine drafts ahead before it asks
whether drafts are kept, and how a scheduler cuts, batches or repeats the work, changes when the token is known, not
what it is.
"""

import hashlib
from collections.abc import Sequence
from enum import StrEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MANTISSA = 2.0**53


class Purpose(StrEnum):
    """What a position's number is for."""

    DRAFT = ""
    KEEP = "/keep"
    REDRAW = "/redraw"


def token_uniform(seed: int, position: int, purpose: Purpose = Purpose.DRAFT) -> float:
    """The number in [0, 1) of token ``position`` (from 0) of the response with ``seed``."""
    digest = hashlib.blake2b(f"{seed}/{position}{purpose}".encode(), digest_size=8).digest()
    # As many bits as a double holds, so that the largest number does not round up to 1.
    return (int.from_bytes(digest, "big") >> 11) / _MANTISSA


def draw_tokens(logprobs: Float[Tensor, "rows vocab"], uniforms: Sequence[float]) -> Int[Tensor, " rows"]:
    """The first token of each row at which the cumulated probability exceeds the row's number.

    A token of probability 0 is never drawn. The sum runs in fp64: in fp32 its rounding would be of
    the size of a rare token's probability.
    """
    return _invert(logprobs.double().exp(), uniforms)


def settle_drafts(
    policy: Float[Tensor, "rows vocab"],
    mixed: Float[Tensor, "rows vocab"],
    drafts: Int[Tensor, " rows"],
    *,
    keep: Sequence[float],
    redraw: Sequence[float],
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Tokens of the mixture from drafts of the policy, and which of them are the drafts.

    Args:
        policy: log-probabilities that ``drafts`` were drawn from.
        mixed: log-probabilities of the mixture at the same positions.
        keep: a row's number for keeping its draft, in [0, 1).
        redraw: a row's number for drawing anew, in [0, 1).
    """
    numbers = torch.tensor(keep, dtype=torch.float64, device=drafts.device)
    place = drafts.unsqueeze(1)
    p, q = (side.gather(1, place).squeeze(1).double().exp() for side in (policy, mixed))
    kept = numbers * p < q
    # Waiting for a GPU to say which rows lost their drafts would cost more than drawing anew for all.
    everywhere = torch.arange(len(drafts), device=drafts.device)
    lost = everywhere[~kept] if drafts.device.type == "cpu" else everywhere
    if not len(lost):
        return drafts, kept
    excess = (mixed[lost].double().exp() - policy[lost].double().exp()).clamp_min(0.0)
    # Where the two differ by rounding alone, nothing may be left to draw from: the draft is as good.
    excess.scatter_add_(1, place[lost], (excess.sum(-1, keepdim=True) <= 0.0).double())
    anew = [redraw[row] for row in lost.tolist()] if len(lost) < len(drafts) else redraw
    tokens = drafts.clone()
    tokens[lost] = torch.where(kept[lost], drafts[lost], _invert(excess, anew))
    return tokens, kept


def draw_mixed_tokens(
    policy: Float[Tensor, "rows vocab"],
    mixed: Float[Tensor, "rows vocab"],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> Int[Tensor, " rows"]:
    """The token of each row from start to end: drafted, then kept or replaced. The rule as a whole, in one place."""
    places = list(zip(seeds, positions, strict=True))
    drafts = draw_tokens(policy, [token_uniform(*place) for place in places])
    return settle_drafts(
        policy,
        mixed,
        drafts,
        keep=[token_uniform(*place, Purpose.KEEP) for place in places],
        redraw=[token_uniform(*place, Purpose.REDRAW) for place in places],
    )[0]


def _invert(weights: Float[Tensor, "rows vocab"], uniforms: Sequence[float]) -> Int[Tensor, " rows"]:
    """The first token at which the cumulated weight exceeds the row's number times the sum."""
    cumulated = weights.cumsum(-1)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=weights.device).unsqueeze(1)
    # Rounding leaves the last sum of probabilities beside 1.
    return torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True).squeeze(1)
