"""Pairs as batches of sequences: side a of pair i is sequence 2·i, side b sequence 2·i + 1."""

from collections.abc import Sequence

from pilaf_ray.data.collate import ResponseGroup, SequenceBatch, collate, collate_shared, micro_batches
from pilaf_ray.types import ResponsePair

LONGEST_SHARED_ROW = 4096
"""Tokens. The mask of a shared row is dense, so longer rows are better off apart."""


class PairBatches:
    """Groups and collates pairs, both sides behind one copy of their prompt where ``share`` allows it."""

    def __init__(self, *, share: bool, max_tokens: int) -> None:
        self._share = share
        self._max_tokens = max_tokens

    def groups(self, pairs: Sequence[ResponsePair]) -> list[list[int]]:
        """Indices of ``pairs`` in micro-batches of at most ``max_tokens`` padded tokens."""
        # One pair that is too long to share sets the budget for all: sharing takes fewer tokens, never more.
        if self._shares(pairs):
            return micro_batches([_shared_length(p) for p in pairs], rows_per_item=1, max_tokens=self._max_tokens)
        return micro_batches([_longer_side(p) for p in pairs], rows_per_item=2, max_tokens=self._max_tokens)

    def collate(self, pairs: Sequence[ResponsePair]) -> SequenceBatch:
        """One micro-batch."""
        groups: list[ResponseGroup] = [
            (pair.plan.prompt.token_ids, (pair.a.token_ids, pair.b.token_ids)) for pair in pairs
        ]
        if self._shares(pairs):
            return collate_shared(groups)
        return collate([(prompt, response) for prompt, responses in groups for response in responses])

    def _shares(self, pairs: Sequence[ResponsePair]) -> bool:
        return self._share and max(map(_shared_length, pairs)) <= LONGEST_SHARED_ROW


def _shared_length(pair: ResponsePair) -> int:
    return len(pair.plan.prompt.token_ids) + len(pair.a.token_ids) + len(pair.b.token_ids)


def _longer_side(pair: ResponsePair) -> int:
    return len(pair.plan.prompt.token_ids) + max(len(pair.a.token_ids), len(pair.b.token_ids))
