"""What both networks thought of each token of a mixed response, kept in the worker until it is asked for."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Record = list[tuple[float, float]]
"""(log π, log π_ref) a token, at temperature 1."""


class TokenRecords:
    """By request and position, so that a step that is computed again overwrites what it left.

    Args:
        capacity: requests kept; beyond it the oldest are dropped, which are those that were aborted.
    """

    def __init__(self, *, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._tokens: OrderedDict[str, dict[int, tuple[Tensor, int]]] = OrderedDict()

    def add(self, keys: Sequence[str], positions: Sequence[int], values: Tensor) -> None:
        """Keep ``values``, shape (rows, 2), one row a request."""
        for row, (key, position) in enumerate(zip(keys, positions, strict=True)):
            # The tensor is read when it is asked for: a GPU need not be waited for here.
            self._tokens.setdefault(key, {})[position] = (values, row)
        while len(self._tokens) > self._capacity:
            self._tokens.popitem(last=False)

    def take(self, key: str) -> Record | None:
        """The tokens of one request in order, once; None if there are none."""
        tokens = self._tokens.pop(key, None)
        if tokens is None:
            return None
        rows = (tokens[position] for position in range(len(tokens)))
        return [(float(values[row, 0]), float(values[row, 1])) for values, row in rows]


class TokenRecordsExtension:
    """Adds to vLLM's worker the methods by which the generator asks."""

    get_model: Callable[[], Any]

    def take_token_records(self, key: str) -> Record | None:
        """See :meth:`TokenRecords.take`."""
        # The model holds the shelf that the processor fills; a copied configuration may name another.
        record: Record | None = self.get_model().shelf.records.take(key)
        return record

    def draft_counts(self) -> tuple[int, int, int, int]:
        """drafted, judged, kept, passes: see :class:`pilaf_ray.types.DraftCounts`."""
        counter = self.get_model().shelf.counter
        return counter.drafted, counter.judged, counter.kept, counter.passes
