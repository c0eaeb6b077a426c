"""Single responses as batches; neighbours that answer the same prompt stand behind one copy of it."""

from collections.abc import Sequence
from itertools import groupby

from pilaf_ray.data.collate import (
    ResponseGroup,
    SequenceBatch,
    collate,
    collate_shared,
    micro_batches,
)
from pilaf_ray.data.pair_batches import LONGEST_SHARED_ROW
from pilaf_ray.types import TokenPair


class ResponseBatches:
    """Groups and collates (prompt, response) token pairs; sequence i of a batch is its item i."""

    def __init__(self, *, share: bool, max_tokens: int) -> None:
        self.share = share
        self._max_tokens = max_tokens

    def groups(self, items: Sequence[TokenPair]) -> list[list[int]]:
        """Indices of ``items`` in micro-batches of at most ``max_tokens`` padded tokens."""
        rows = self._rows(items)
        lengths = [len(items[row[0]][0]) + sum(len(items[i][1]) for i in row) for row in rows]
        batches = micro_batches(lengths, rows_per_item=1, max_tokens=self._max_tokens)
        return [[index for row in batch for index in rows[row]] for batch in batches]

    def collate(self, items: Sequence[TokenPair]) -> SequenceBatch:
        """One micro-batch."""
        if not self.share:
            return collate(items)
        groups: list[ResponseGroup] = [(items[row[0]][0], tuple(items[i][1] for i in row)) for row in self._rows(items)]
        return collate_shared(groups)

    def _rows(self, items: Sequence[TokenPair]) -> list[list[int]]:
        """Runs of items with one prompt, cut where a row would outgrow the budget; else one item a row."""
        if not self.share:
            return [[index] for index in range(len(items))]
        limit = min(LONGEST_SHARED_ROW, self._max_tokens)
        rows: list[list[int]] = []
        for prompt, run in groupby(range(len(items)), key=lambda index: items[index][0]):
            length = limit + 1
            for index in run:
                length += len(items[index][1])
                if length > limit:
                    rows.append([])
                    length = len(prompt) + len(items[index][1])
                rows[-1].append(index)
        return rows
