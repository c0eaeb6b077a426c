"""Scored rollouts as padded tensors, and where a micro-batch's tokens stand in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pilaf_ray.data.collate import SequenceBatch
from pilaf_ray.data.response_batches import ResponseBatches
from pilaf_ray.types import ScoredGroup, TokenPair


@dataclass(frozen=True, kw_only=True)
class Places:
    """The tokens of some rows, in the order in which a model answers for them."""

    rows: list[int]
    row_of_token: Tensor
    token: Tensor

    def of(self, table: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Entries of a (responses, tokens) table, or of one that holds ``rows`` only."""
        if rows is None:
            return table[self.row_of_token, self.token]
        where = torch.zeros(max(rows) + 1, dtype=torch.long, device=table.device)
        where[torch.tensor(rows, device=table.device)] = torch.arange(len(rows), device=table.device)
        return table[where[self.row_of_token], self.token]


class TokenRows:
    """A step's rollouts: row i is response i, those of one prompt next to each other."""

    def __init__(self, groups: Sequence[ScoredGroup], device: torch.device) -> None:
        self.items: list[TokenPair] = [(g.plan.prompt.token_ids, r.token_ids) for g in groups for r in g.responses]
        self.lengths = [len(response) for _, response in self.items]
        self.scores = torch.tensor([score for g in groups for score in g.scores.values], device=device)
        self.behaviour = _padded([r.logprobs for g in groups for r in g.responses], device)
        self.reference = _padded([row for g in groups for row in g.reference_logprobs], device)
        positions = torch.arange(self.behaviour.shape[1], device=device)
        self.mask = positions < torch.tensor(self.lengths, device=device)[:, None]

    def __len__(self) -> int:
        return len(self.items)

    def places(self, rows: Sequence[int]) -> Places:
        """Where the tokens of ``rows`` stand, one row behind the other."""
        device = self.mask.device
        owner = [row for row in rows for _ in range(self.lengths[row])]
        token = [position for row in rows for position in range(self.lengths[row])]
        return Places(
            rows=list(rows),
            row_of_token=torch.tensor(owner, device=device),
            token=torch.tensor(token, device=device),
        )

    def collate(self, batches: ResponseBatches, rows: Sequence[int]) -> SequenceBatch:
        """What a model reads for ``rows``."""
        return batches.collate([self.items[row] for row in rows]).to(self.mask.device)


def _padded(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.float32, device=device) for row in rows], batch_first=True)
