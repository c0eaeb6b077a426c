"""A forward pass over some of a batch's requests, so that plain requests never pay for the reference.

vLLM plans a step for all of its requests. Here the plan is narrowed to chosen requests:
their tokens are gathered, their rows of the block table and their slots stay what they
were, and the attention layers read the narrowed plan from the forward context.

Written for vLLM's CPU attention. Elsewhere the reference sees the whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

ModelForward = Callable[[Tensor, Tensor], Tensor]


def routable_layers(context: ForwardContext, prefix: str) -> tuple[str, ...]:
    """Layers under ``prefix`` that keep a cache, if the step's plans for all of them can be narrowed; else none."""
    plans = context.attn_metadata
    if not isinstance(plans, dict):
        return ()
    names = tuple(name for name in plans if name.startswith(f"{prefix}."))
    return names if all(isinstance(plans[name], CPUAttentionMetadata) for name in names) else ()


def forward_rows(
    model: ModelForward, input_ids: Tensor, positions: Tensor, *, rows: Sequence[int], layers: Sequence[str]
) -> Tensor:
    """Hidden states (tokens, hidden) of ``model``; zeros at the tokens of requests outside ``rows``.

    Args:
        model: token ids and positions, both (tokens,), to hidden states.
        rows: positions of the wanted requests in the batch, ascending.
        layers: the model's attention layers, from :func:`routable_layers`.
    """
    tokens, plans, slots = narrow_plans(rows, layers)
    inner = replace(get_forward_context(), attn_metadata=plans, slot_mapping=slots)
    with override_forward_context(inner):
        states = model(input_ids[tokens], positions[tokens])
    whole = states.new_zeros(input_ids.shape[0], states.shape[-1])
    whole[tokens] = states
    return whole


def narrow_plans(
    rows: Sequence[int], layers: Sequence[str]
) -> tuple[Tensor, dict[str, CPUAttentionMetadata], dict[str, Tensor]]:
    """The tokens of ``rows`` in the flattened batch, and each layer's plan and slots for them alone.

    Args:
        rows: positions of the wanted requests in the batch, ascending.
        layers: from :func:`routable_layers`.
    """
    context = get_forward_context()
    plans: Any = context.attn_metadata
    slots: Any = context.slot_mapping
    chosen = torch.tensor(rows)
    tokens = _tokens_of(plans[layers[0]].query_start_loc, chosen)
    narrowed: dict[int, CPUAttentionMetadata] = {}
    for name in layers:
        plan = plans[name]
        if id(plan) not in narrowed:
            sharing = [context.no_compile_layers[other] for other in layers if plans[other] is plan]
            narrowed[id(plan)] = _narrow(plan, chosen, tokens, sharing)
    return (
        tokens,
        {name: narrowed[id(plans[name])] for name in layers},
        {name: slots[name][tokens] for name in layers if slots.get(name) is not None},
    )


def _tokens_of(query_start_loc: Tensor, rows: Tensor) -> Tensor:
    """Indices of the tokens that belong to ``rows`` in the flattened batch."""
    starts, ends = query_start_loc[rows].tolist(), query_start_loc[rows + 1].tolist()
    return torch.cat([torch.arange(start, end) for start, end in zip(starts, ends, strict=True)])


def _narrow(plan: CPUAttentionMetadata, rows: Tensor, tokens: Tensor, layers: Sequence[Any]) -> CPUAttentionMetadata:
    lengths = plan.query_start_loc[rows + 1] - plan.query_start_loc[rows]
    query_start_loc = torch.zeros(len(rows) + 1, dtype=plan.query_start_loc.dtype)
    query_start_loc[1:] = lengths.cumsum(0)
    seq_lens = plan.seq_lens[rows]
    # The scratch plan may assume a sliding window only where all layers share it.
    windows = {layer.impl.sliding_window for layer in layers}
    layer = layers[0]
    return replace(
        plan,
        num_actual_tokens=len(tokens),
        max_query_len=int(lengths.max()),
        query_start_loc=query_start_loc,
        max_seq_len=int(seq_lens.max()),
        seq_lens=seq_lens,
        block_table=plan.block_table[rows],
        slot_mapping=plan.slot_mapping[tokens],
        scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(rows),
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_size,
            seq_lens=seq_lens,
            dtype=layer.dtype,
            query_start_loc=query_start_loc,
            causal=plan.causal,
            sliding_window_size=windows.pop() if len(windows) == 1 else -1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=layer.impl.kv_cache_dtype,
        ),
    )
