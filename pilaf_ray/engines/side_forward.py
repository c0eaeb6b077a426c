"""A forward pass of one of the interpolated model's two networks over tokens that vLLM did not schedule.

vLLM plans a step for the tokens that it scheduled. Drafted tokens follow behind them, in cache blocks that the
scheduler reserved; here the plan for them is made with vLLM's own builders of attention metadata.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Consecutive tokens of one request, all before them being in the cache."""

    row: int
    """Its place in the batch."""
    start: int
    """Position of the first token."""
    tokens: Sequence[int]


def side_states(runner: Any, side: str, stretches: Sequence[Stretch]) -> Tensor:
    """Hidden states (tokens, hidden) of ``side`` of the model, stretch after stretch.

    Args:
        runner: vLLM's model runner, which has the model, the block tables and the attention groups.
        side: prefix of the network's layers, and its name in the model.
        stretches: at least one.
    """
    device = runner.device
    tokens = torch.tensor([token for stretch in stretches for token in stretch.tokens], device=device)
    positions = torch.cat([torch.arange(s.start, s.start + len(s.tokens), device=device) for s in stretches])
    plans: dict[str, Any] = {}
    slots: dict[str, Tensor] = {}
    for number, groups in enumerate(runner.attn_groups):
        table = runner.input_batch.block_table[number]
        common = _common_plan(table, stretches, positions)
        for group in groups:
            names = [name for name in group.layer_names if name.startswith(f"{side}.")]
            plan = group.build_metadata(common) if names else None
            plans |= dict.fromkeys(names, plan)
            slots |= dict.fromkeys(names, common.slot_mapping)
    with set_forward_context(plans, runner.vllm_config, num_tokens=len(tokens), slot_mapping=slots):
        states: Tensor = getattr(runner.model, side)(tokens, positions)
    return states


def _common_plan(table: Any, stretches: Sequence[Stretch], positions: Tensor) -> CommonAttentionMetadata:
    """What every attention backend is told about ``stretches``, with one group's block table."""
    device = positions.device
    lengths = torch.tensor([len(stretch.tokens) for stretch in stretches], dtype=torch.int32)
    starts = torch.zeros(len(stretches) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    ends = torch.tensor([stretch.start for stretch in stretches], dtype=torch.int32) + lengths
    rows = torch.tensor([stretch.row for stretch in stretches], device=device)
    blocks = table.block_table.gpu[rows]
    owner = torch.repeat_interleave(torch.arange(len(stretches), device=device), lengths.to(device))
    slots = blocks[owner, positions // table.block_size].long() * table.block_size + positions % table.block_size
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=ends.to(device),
        seq_lens_cpu_upper_bound=ends,
        num_reqs=len(stretches),
        num_actual_tokens=len(positions),
        max_query_len=int(lengths.max()),
        max_seq_len=int(ends.max()),
        block_table_tensor=blocks,
        slot_mapping=slots,
        positions=positions,
        is_prefilling=torch.zeros(len(stretches), dtype=torch.bool),
    )
