"""From pairs to padded tensors, in micro-batches of bounded size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

TokenPair = tuple[tuple[int, ...], tuple[int, ...]]
"""(prompt tokens, response tokens) of one sequence."""


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Right-padded sequences and where their response tokens are predicted."""

    input_ids: Int[Tensor, "row seq"]
    attention_mask: Int[Tensor, "row seq"]
    token_row: Int[Tensor, "token"]
    """Row of each response token."""
    token_position: Int[Tensor, "token"]
    """Position of the hidden state that predicts it: one before the token itself."""
    targets: Int[Tensor, "token"]

    def to(self, device: torch.device) -> "SequenceBatch":
        """The same batch on ``device``."""
        return SequenceBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def collate(items: Sequence[TokenPair], *, pad_token_id: int = 0) -> SequenceBatch:
    """Pad ``items`` to the longest. Responses are non-empty; pads are never attended to."""
    width = max(len(prompt) + len(response) for prompt, response in items)
    input_ids = torch.full((len(items), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, (prompt, response) in enumerate(items):
        tokens = torch.tensor(prompt + response, dtype=torch.long)
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        rows += [row] * len(response)
        positions += range(len(prompt) - 1, len(prompt) + len(response) - 1)
        targets += response
    return SequenceBatch(
        input_ids=input_ids,
        attention_mask=mask,
        token_row=torch.tensor(rows),
        token_position=torch.tensor(positions),
        targets=torch.tensor(targets, dtype=torch.long),
    )


def micro_batches(lengths: Sequence[int], *, rows_per_item: int, max_tokens: int) -> list[list[int]]:
    """Group items by length so that rows × longest ≤ ``max_tokens``, longest group first.

    An item that alone exceeds the budget gets a group of its own.

    Args:
        lengths: the longest row of each item, in tokens.
        rows_per_item: 2 for pairs, 1 for single sequences.
        max_tokens: padded tokens of one group.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first item of a group is its longest, so it alone sets the padded width.
        if groups and (len(groups[-1]) + 1) * rows_per_item * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
