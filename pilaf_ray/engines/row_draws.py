"""What a batch's rows draw from, and what they draw; shared by the steps of one token and by those that draft ahead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from pilaf_ray.sampling.draw import Purpose, draw_tokens, settle_drafts, token_uniform

if TYPE_CHECKING:
    from vllm import SamplingParams

COEFFICIENT_KEY = "pilaf_coefficient"
DRAW_KEY = "pilaf_draw"


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How a request's tokens are drawn; ``record`` names it in the shelf's records."""

    seed: int
    temperature: float
    top_p: float
    record: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A request at its place in the batch."""

    coefficient: float
    draw: Draw | None
    """None: the likeliest token, and log-probabilities at temperature 1."""
    output: Sequence[int]
    """vLLM's own list of the request's tokens; it grows."""

    @classmethod
    def of(cls, params: "SamplingParams", output: Sequence[int]) -> "Row":
        """The row of a request with these parameters and tokens."""
        draw = (params.extra_args or {}).get(DRAW_KEY)
        return cls(coefficient=float(coefficient_of(params)), draw=Draw(**draw) if draw else None, output=output)


def coefficient_of(params: "SamplingParams") -> float:
    """The request's c; 0 (the plain policy) where none was given."""
    value: float = (params.extra_args or {}).get(COEFFICIENT_KEY, 0.0)
    return value


def mix_logits(policy: Tensor, reference: Tensor, coefficient: Tensor) -> Tensor:
    """(1 + c)·policy − c·reference in fp32; shapes (rows, vocab), (rows, vocab), (rows,).

    A token that either side rules out (−inf: padding, a mask) stays ruled out;
    without this, c = −1 would turn a masked entry into NaN. Rows with c = 0 are the
    policy's, bit for bit.
    """
    policy, reference = policy.float(), reference.float()
    scale = coefficient.unsqueeze(1)
    mixed = (1 + scale) * policy - scale * reference
    allowed = policy.isfinite() & reference.isfinite()
    mixed = torch.where(allowed, mixed, -math.inf)
    return torch.where(scale == 0, policy, mixed)


def row_logprobs(logits: Tensor, draws: Sequence[Draw | None]) -> Tensor:
    """Log-probabilities in fp32, (rows, vocab): of drawn rows at their temperature and within their top-p."""
    places = [place for place, draw in enumerate(draws) if draw and (draw.temperature != 1.0 or draw.top_p != 1.0)]
    if places:
        wanted = [draw for draw in (draws[place] for place in places) if draw]
        index = torch.tensor(places, device=logits.device)
        temperature = torch.tensor([draw.temperature for draw in wanted], device=logits.device)
        rows = logits[index].float() / temperature.unsqueeze(1)
        if any(draw.top_p < 1.0 for draw in wanted):
            rows = apply_top_k_top_p(rows, None, torch.tensor([draw.top_p for draw in wanted], device=logits.device))
        logits = logits.float().index_copy(0, index, rows)
    return logits.log_softmax(-1, dtype=torch.float32)


def draft(logprobs: Tensor, draws: Sequence[Draw | None], positions: Sequence[int]) -> Tensor:
    """A token of each row, (rows,), from its own distribution."""
    if not any(draws):
        return logprobs.argmax(-1)
    # A row that is not drawn takes any number; what it makes of it is thrown away.
    tokens = draw_tokens(logprobs, _numbers(draws, positions, Purpose.DRAFT))
    return tokens if all(draws) else _unless_drawn(draws, tokens, logprobs.argmax(-1))


def settle(
    policy: Tensor, mixed: Tensor, drafts: Tensor, draws: Sequence[Draw | None], positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Tokens of the mixture, (rows,), and where they are the policy's ``drafts``; rows of log-probabilities."""
    greedy = mixed.argmax(-1) if not all(draws) else drafts
    if not any(draws):
        return greedy, greedy == drafts
    keep, redraw = (_numbers(draws, positions, purpose) for purpose in (Purpose.KEEP, Purpose.REDRAW))
    tokens, kept = settle_drafts(policy, mixed, drafts, keep=keep, redraw=redraw)
    if all(draws):
        return tokens, kept
    return _unless_drawn(draws, tokens, greedy), _unless_drawn(draws, kept, greedy == drafts)


def own_logprobs(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """(log π, log π_ref) of ``tokens`` at temperature 1, (rows, 2), from both networks' logits."""
    place = tokens.unsqueeze(1)
    sides = (side.float() for side in (policy, reference))
    return torch.cat([side.gather(1, place) - side.logsumexp(-1, keepdim=True) for side in sides], dim=1)


def _numbers(draws: Sequence[Draw | None], positions: Sequence[int], purpose: Purpose) -> list[float]:
    places = zip(draws, positions, strict=True)
    return [token_uniform(draw.seed, position, purpose) if draw else 0.0 for draw, position in places]


def _unless_drawn(draws: Sequence[Draw | None], drawn: Tensor, other: Tensor) -> Tensor:
    return torch.where(torch.tensor([draw is not None for draw in draws], device=drawn.device), drawn, other)
