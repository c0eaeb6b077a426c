"""Log-probabilities below an ordinary output head, with a backward pass of their own.

What the losses need of a token is one number of a row as long as the vocabulary, and what the head's gradient needs
is that row's softmax. So the logits of up to ``chunk_tokens`` tokens are kept and become their own gradient in place;
those of more are computed again, a chunk at a time. Autograd would hold several such tables at once and go over each
several times, as it does for other heads (``losses/logprobs.py``).
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pilaf_ray.engines.direct_gradients import DirectLinear, add_product

_ROWS = 16
"""Rows of logits that are worked on at a time: few enough to stay in a cache."""


def is_ordinary(head: nn.Module) -> bool:
    """Whether ``head`` is a product with its weight and nothing else, so that :func:`head_logprobs` applies."""
    return type(head) in (nn.Linear, DirectLinear) and head.bias is None and "forward" not in vars(head)


def head_logprobs(
    states: Float[Tensor, "token width"], targets: Int[Tensor, "token"], head: nn.Linear, chunk_tokens: int
) -> Float[Tensor, "token"]:
    """log p(target | state) for each row, in fp32.

    Args:
        states: last hidden states at the positions *before* each target token.
        targets: the tokens to score.
        head: for which :func:`is_ordinary` holds.
        chunk_tokens: rows whose logits exist at one time.
    """
    logprobs: Tensor = _HeadLogprobs.apply(states, head.weight, targets, chunk_tokens, isinstance(head, DirectLinear))
    return logprobs


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, direct: bool) -> Tensor:
        ctx.chunk_tokens, ctx.direct, ctx.kept = chunk_tokens, direct, None
        normalisers = states.new_empty(len(states), dtype=torch.float32)
        picked = torch.empty_like(normalisers)
        for chunk in _slices(len(states), chunk_tokens):
            logits = torch.mm(states[chunk], weight.t())
            picked[chunk] = logits.gather(-1, targets[chunk, None])[:, 0]
            normalisers[chunk] = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(_ROWS)])
            if len(states) <= chunk_tokens:
                ctx.kept = logits
            # Before there is a next one.
            del logits
        # See direct_gradients.py: its ``.grad`` is wanted.
        ctx.weight = weight
        ctx.save_for_backward(states, targets, normalisers)
        return picked - normalisers

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        states, targets, normalisers = ctx.saved_tensors
        weight, below, own = ctx.weight, torch.empty_like(states), None
        for chunk in _slices(len(states), ctx.chunk_tokens):
            logits = torch.mm(states[chunk], weight.t()) if ctx.kept is None else ctx.kept
            # A second backward pass through the same graph finds no logits any more, and computes them again.
            ctx.kept = None
            _to_gradient(logits, targets[chunk], normalisers[chunk], gradient[chunk])
            below[chunk] = torch.mm(logits, weight)
            if ctx.needs_input_grad[1] and ctx.direct:
                add_product(weight, logits, states[chunk])
            elif ctx.needs_input_grad[1]:
                own = torch.mm(logits.t(), states[chunk]) if own is None else own.addmm_(logits.t(), states[chunk])
            del logits
        return below, own, None, None, None


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _to_gradient(logits: Tensor, targets: Tensor, normalisers: Tensor, gradient: Tensor) -> None:
    """Replace each row of logits by the gradient with regard to it: (1[target] − softmax) times ``gradient``."""
    parts = (values.split(_ROWS) for values in (logits, targets, normalisers, gradient))
    for rows, wanted, normaliser, factor in zip(*parts, strict=True):
        rates = rows.float().sub(normaliser[:, None]).exp_().mul_(-factor[:, None])
        rows.copy_(rates.scatter_add_(1, wanted[:, None], factor[:, None]))
