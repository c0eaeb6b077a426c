"""Gradients of weights that are added to ``.grad`` by the product that makes them.

Autograd makes each weight's gradient of a micro-batch a tensor of its own and adds it afterwards: three more passes
over memory as large as the model, for every micro-batch. The embeddings' gradient is nearly all zeros, and still as
large as they are. So small micro-batches, which need little memory for activations, would take longer.

Nothing but ``.grad`` learns of these gradients: hooks on parameters, on which DeepSpeed's ZeRO 1 to 3 rely, do not see
them, and ``torch.autograd.grad`` does not return them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_product(weight: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ·right to the gradient of ``weight``.

    Args:
        weight: shape (out, in).
        left: shape (rows, out).
        right: shape (rows, in).
    """
    if weight.grad is None:
        weight.grad = torch.mm(left.t(), right)
    else:
        weight.grad.addmm_(left.t(), right)


class DirectLinear(nn.Linear):
    """A linear layer whose weight gets its gradient by :func:`add_product`."""

    def forward(self, input: Tensor) -> Tensor:
        """As of every linear layer."""
        product: Tensor = _Product.apply(input, self.weight, self.bias)
        return product


class DirectEmbedding(nn.Embedding):
    """An embedding that adds to the gradients of those rows only that were looked up."""

    def forward(self, input: Tensor) -> Tensor:
        """As of every embedding."""
        rows: Tensor = _Lookup.apply(input, self.weight, self.padding_idx)
        return rows


def add_gradients_directly(network: nn.Module) -> None:
    """Make ordinary linear layers and embeddings of ``network`` direct ones, where their weights are trained."""
    for module in network.modules():
        # Subclasses do something else in their forward.
        if type(module) is nn.Linear and module.weight.requires_grad:
            module.__class__ = DirectLinear
        elif type(module) is nn.Embedding and module.weight.requires_grad and _plain(module):
            module.__class__ = DirectEmbedding


def _plain(embedding: nn.Embedding) -> bool:
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        # A saved tensor may come back as another object (gradient checkpointing detaches it), without this ``.grad``.
        ctx.weight = weight
        ctx.save_for_backward(rows)
        return F.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        add_product(ctx.weight, flat, rows.reshape(-1, rows.shape[-1]))
        below = torch.mm(flat, ctx.weight).view(rows.shape) if ctx.needs_input_grad[0] else None
        return below, None, flat.sum(0) if ctx.needs_input_grad[2] else None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: nn.Parameter, padding: int | None) -> Tensor:
        ctx.weight, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        flat, rows = ids.flatten(), gradient.reshape(-1, gradient.shape[-1])
        if ctx.padding is not None:
            rows = rows.masked_fill((flat == ctx.padding)[:, None], 0.0)
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        ctx.weight.grad.index_add_(0, flat, rows)
        return None, None, None
