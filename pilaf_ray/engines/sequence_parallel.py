"""Ulysses sequence parallelism: a row of tokens is computed by several ranks together.

Each rank of a group has an equal stretch of every row. Attention is DeepSpeed's: an all-to-all gives each rank whole
rows of a share of the heads, and another one gives the stretches back. It stands in transformers' registry of
attention functions, so the model's code stays what it is. DeepSpeed's own way to put it there is not taken: it drops
masks, without which responses cannot share a prompt, and replaces the attention of every model in the process.

What is scored are response tokens, and those lie at the ends of rows: the last rank would score nearly all of
them. So their hidden states are dealt out evenly before the head. Every rank gets all log-probabilities, with the
gradient of its own part; summed over the ranks, as gradients are under any ZeRO stage, that is the whole gradient.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pilaf_ray.data.collate import SequenceBatch, collate
from pilaf_ray.errors import ModelError

_PROBE = [((3, 1, 4, 1, 5), (9, 2, 6)), ((2, 7), (1, 8, 2))]
"""Prompts and responses on which a model shows whether it can be parted."""
_CORE = "sdpa"


class SequenceGroup:
    """The ranks that compute the same rows: ``size`` neighbours. Made on all ranks together.

    Args:
        size: ranks of a group; divides the number of all ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._group = _process_group(size)
        self.rank = torch.distributed.get_rank(self._group)

    def attach(self, network: nn.Module) -> None:
        """Exchange heads for tokens around every attention of ``network``.

        Raises:
            ModelError: its attention is not taken from transformers' registry, or is not PyTorch's own.
        """
        model: Any = network
        own = _registered(self.size)
        if model.config._attn_implementation == _CORE:
            model.set_attn_implementation(own)
        if model.config._attn_implementation != own:
            raise ModelError(refusal(type(network).__name__, "it has an attention of its own"))

    def stretch(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's tokens and positions, both (rows, seq / size), and who attends to whom in whole rows.

        Rows are padded to a multiple of ``size``. Pads stand behind everything, so a causal mask keeps them apart from
        the rest, and None says that it is causal.
        """
        length = batch.input_ids.shape[1]
        more = -length % self.size
        own = slice(self.rank * (length + more) // self.size, (self.rank + 1) * (length + more) // self.size)
        tokens, places = (pad(values, (0, more))[:, own] for values in (batch.input_ids, batch.position_ids))
        if batch.attention_mask.ndim == 2:
            return tokens, places, None
        mask = pad(batch.attention_mask, (0, more, 0, more))
        mask[..., torch.arange(length, length + more), torch.arange(length, length + more)] = True
        return tokens, places, mask

    def deal(self, hidden: Tensor, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """(states, targets) of this rank's even share of the response tokens, from all ranks' ``hidden``.

        Args:
            hidden: last hidden states of this rank's stretch, shape (rows, seq / size, width).
        """
        count = len(batch.targets)
        share = -(-count // self.size)
        # The last share is filled up with repetitions, so that all ranks do the same work.
        places = torch.arange(share * self.size, device=hidden.device).clamp(max=count - 1)
        rows, positions = batch.token_row[places], batch.token_position[places]
        owner, scorer = positions // hidden.shape[1], torch.arange(len(places), device=hidden.device) // share
        mine = owner == self.rank
        given = torch.bincount(scorer[mine], minlength=self.size).tolist()
        taken = scorer == self.rank
        received = torch.bincount(owner[taken], minlength=self.size).tolist()
        sent = hidden[rows[mine], positions[mine] - self.rank * hidden.shape[1]]
        arrived = _Exchange.apply(sent, given, received, self._group)
        # They come by owner, and by place among those of one owner.
        order = torch.argsort(owner[taken], stable=True)
        return arrived[torch.argsort(order)], batch.targets[places[taken]]

    def collect(self, mine: Tensor, count: int) -> Tensor:
        """All ranks' shares behind each other, the first ``count``; the gradient goes to one's own."""
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(parts, mine.detach(), group=self._group)
        parts[self.rank] = mine
        return torch.cat(parts)[:count]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: ``given[r]`` of ours go to rank r of the group, ``received[r]`` come from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], received: list[int], group: Any) -> Tensor:
        ctx.given, ctx.received, ctx.group = given, received, group
        return _all_to_all(rows, given, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _all_to_all(gradient, ctx.received, ctx.given, ctx.group), None, None, None


def _all_to_all(rows: Tensor, given: list[int], received: list[int], group: Any) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    torch.distributed.all_to_all_single(found, rows.contiguous(), received, given, group=group)
    return found


@functools.cache
def _process_group(size: int) -> Any:
    """This rank's group of ``size`` neighbours; a process has one for each size."""
    ranks = range(torch.distributed.get_world_size())
    groups = [torch.distributed.new_group(list(ranks[start : start + size])) for start in ranks[::size]]
    return groups[torch.distributed.get_rank() // size]


@functools.cache
def _registered(size: int) -> str:
    """The name under which transformers finds attention over groups of ``size`` ranks."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    @functools.cache
    def exchange(rows: int, heads: int, kv_heads: int, width: int) -> Any:
        # DeepSpeed fixes the number of rows, and micro-batches have different ones.
        return UlyssesSPAttentionHF(
            attn=ALL_ATTENTION_FUNCTIONS[_CORE],
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=width,
            kv_head_count=kv_heads,
            num_hidden_layers=1,
            process_group=_process_group(size),
            seq_length_is_variable=True,
        )

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        rows, heads, tokens, width = query.shape
        if named.get("position_ids") is None:
            # DeepSpeed wants them for other attentions; this one has no use for them.
            named["position_ids"] = torch.zeros(rows, tokens, dtype=torch.long, device=query.device)
        return exchange(rows, heads, key.shape[1], width)(module, query, key, value, *rest, **named)

    name = f"ulysses_{size}"
    AttentionInterface.register(name, attention)
    return name


def probe() -> SequenceBatch:
    """A small batch, on which a parted model must give what it gave whole."""
    return collate(_PROBE)


def refusal(what: str, why: str) -> str:
    """One line for a model that cannot be parted."""
    return f"learner.sequence_parallel: {what}: {why}: set learner.sequence_parallel: 1, or train another model"
