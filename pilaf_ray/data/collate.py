"""From pairs to padded tensors, in micro-batches of bounded size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pilaf_ray.types import TokenPair

ResponseGroup = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""A prompt's tokens and those of each response to it."""


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Right-padded rows and where the response tokens in them are predicted.

    A sequence is one prompt with one response. A row holds one sequence, or a prompt
    with all its responses, which then see the prompt but not each other.
    """

    input_ids: Int[Tensor, "row seq"]
    position_ids: Int[Tensor, "row seq"]
    attention_mask: Int[Tensor, "row seq"] | Bool[Tensor, "row 1 seq seq"]
    """1 at tokens and 0 at padding, or who attends to whom where responses share a prompt."""
    token_row: Int[Tensor, "token"]
    """Row of each response token."""
    token_position: Int[Tensor, "token"]
    """Place in the row of the hidden state that predicts it."""
    token_sequence: Int[Tensor, "token"]
    """Sequence of each response token, numbered in the order of the arguments."""
    targets: Int[Tensor, "token"]
    end_row: Int[Tensor, "sequence"]
    """Row of each sequence."""
    end_position: Int[Tensor, "sequence"]
    """Place in the row of its last response token."""
    sequences: int

    def to(self, device: torch.device) -> "SequenceBatch":
        """The same batch on ``device``."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return SequenceBatch(**moved, sequences=self.sequences)


def collate(items: Sequence[TokenPair], *, pad_token_id: int = 0) -> SequenceBatch:
    """One row a sequence. Responses are non-empty; pads are never attended to."""
    rows = [(prompt, (response,)) for prompt, response in items]
    mask = torch.zeros(len(rows), _width(rows), dtype=torch.long)
    for row, (prompt, response) in enumerate(items):
        mask[row, : len(prompt) + len(response)] = 1
    return _batch(rows, mask, pad_token_id)


def collate_shared(groups: Sequence[ResponseGroup], *, pad_token_id: int = 0) -> SequenceBatch:
    """One row a prompt with its responses one behind the other, so that the prompt is computed once.

    Positions restart at every response and the mask keeps responses apart, so each
    sequence gets the log-probabilities of a row of its own, up to rounding.
    """
    width = _width(groups)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(groups), 1, 1)
    for row, (prompt, responses) in enumerate(groups):
        start = len(prompt)
        mask[row, :start, :start] = True
        for response in responses:
            end = start + len(response)
            mask[row, start:end, : len(prompt)] = True
            mask[row, start:end, start:end] = True
            start = end
    return _batch(groups, mask.tril()[:, None], pad_token_id)


def _width(rows: Sequence[ResponseGroup]) -> int:
    return max(len(prompt) + sum(map(len, responses)) for prompt, responses in rows)


def _batch(rows: Sequence[ResponseGroup], mask: Tensor, pad_token_id: int) -> SequenceBatch:
    input_ids = torch.full((len(rows), mask.shape[-1]), pad_token_id, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    token_rows: list[int] = []
    positions: list[int] = []
    token_sequences: list[int] = []
    targets: list[int] = []
    end_rows: list[int] = []
    ends: list[int] = []
    sequence = 0
    for row, (prompt, responses) in enumerate(rows):
        tokens, places = list(prompt), list(range(len(prompt)))
        for response in responses:
            # The prompt's last state predicts every response's first token.
            positions += [len(prompt) - 1, *range(len(tokens), len(tokens) + len(response) - 1)]
            tokens += response
            places += range(len(prompt), len(prompt) + len(response))
            token_rows += [row] * len(response)
            token_sequences += [sequence] * len(response)
            targets += response
            end_rows.append(row)
            ends.append(len(tokens) - 1)
            sequence += 1
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        position_ids[row, : len(tokens)] = torch.tensor(places)
    return SequenceBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        token_row=torch.tensor(token_rows),
        token_position=torch.tensor(positions),
        token_sequence=torch.tensor(token_sequences),
        targets=torch.tensor(targets, dtype=torch.long),
        end_row=torch.tensor(end_rows),
        end_position=torch.tensor(ends),
        sequences=sequence,
    )


def micro_batches(lengths: Sequence[int], *, rows_per_item: int, max_tokens: int) -> list[list[int]]:
    """Group items by length so that rows × longest ≤ ``max_tokens``, longest group first.

    An item that alone exceeds the budget gets a group of its own.

    Args:
        lengths: the longest row of each item, in tokens.
        rows_per_item: 2 for pairs in rows of their own, 1 for single or shared rows.
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
