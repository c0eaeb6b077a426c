"""Log-probabilities of response tokens without a full logits tensor.

With a 49,152-word vocabulary the logits of one batch outweigh the network. Here
only the positions that predict a response token get logits, a chunk at a time, and
several chunks are computed again in the backward pass, so memory is bounded by
``chunk_tokens`` × vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Float[Tensor, "token width"],
    targets: Int[Tensor, "token"],
    head: Callable[[Tensor], Tensor],
    chunk_tokens: int,
) -> Float[Tensor, "token"]:
    """log p(target | hidden) for each row, in fp32.

    Args:
        hidden: last hidden states at the positions *before* each target token.
        targets: the tokens to score.
        head: hidden states to logits, e.g. a model's output embedding.
        chunk_tokens: rows whose logits exist at one time.
    """

    def score(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = head(rows).float()
        picked = logits.gather(-1, wanted[:, None])[:, 0]
        return picked - torch.logsumexp(logits, dim=-1)

    parts = []
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows, wanted = hidden[start : start + chunk_tokens], targets[start : start + chunk_tokens]
        # One chunk alone bounds nothing by being computed again.
        if torch.is_grad_enabled() and hidden.shape[0] > chunk_tokens:
            parts.append(checkpoint(score, rows, wanted, use_reentrant=False))
        else:
            parts.append(score(rows, wanted))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
