"""An endless, reproducible order of a prompt set that is never in memory as a whole.

Each epoch shuffles the shards, joins neighbours in that order to windows of at least ``WINDOW`` prompts, and shuffles
the prompts of each window. Every one of these draws comes from (seed, epoch, window), so the prompt at a position is
found by reading its window alone: the position is the whole state. Two windows are held, the second read ahead.
"""

import random
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pilaf_ray.data.prompt_shards import PromptShards
from pilaf_ray.data.prompt_turns import PromptTurn
from pilaf_ray.errors import PromptError
from pilaf_ray.types import Prompt

WINDOW = 16_384
"""Prompts that are shuffled among each other; a window has one shard more at most."""

Window = list[tuple[int, str]]
"""(number in the set, text), in the order of the epoch."""


class StreamCursor:
    """Walks a sharded set.

    Args:
        render: makes a prompt of a text; None where it is too long and is to be dropped. Its place is taken by the
            next one of the window that fits, in a draw of its own, so that no place is left empty.
    """

    def __init__(
        self, shards: PromptShards, *, seed: int, render: Callable[[str], Prompt | None], window: int = WINDOW
    ) -> None:
        self._shards, self._seed, self._render, self._rows = shards, seed, render, window
        self._epoch = -1
        self._windows: list[list[int]] = []
        """Shards of each window of the epoch."""
        self._starts: list[int] = []
        """Position in the epoch at which each window begins."""
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")
        self._read: dict[tuple[int, int], Future[Window]] = {}

    def at(self, position: int) -> PromptTurn:
        """What is asked at ``position``, from 0. Raises PromptError where it cannot be read or nothing fits."""
        epoch, offset = divmod(position, self._shards.rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._windows, self._starts = self._plan(epoch)
        number = bisect_right(self._starts, offset) - 1
        texts = self._window(epoch, number)
        place = offset - self._starts[number]
        for distance in range(len(texts)):
            row, text = texts[(place + distance) % len(texts)]
            prompt = self._render(text)
            if prompt is not None:
                # Nothing else in the epoch has this number: equal texts and stand-ins make pairs of their own.
                return PromptTurn(epoch=epoch, draw=row + distance * self._shards.rows, prompt=prompt)
        raise PromptError(f"none of {len(texts)} prompts read together fits prompts.max_prompt_tokens: raise it")

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _plan(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        order = list(range(len(self._shards.shards)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        windows: list[list[int]] = []
        starts: list[int] = []
        begun, rows = 0, self._rows
        for shard in order:
            if rows >= self._rows:
                windows.append([])
                starts.append(begun)
                rows = 0
            windows[-1].append(shard)
            rows += self._shards.shards[shard].rows
            begun += self._shards.shards[shard].rows
        return windows, starts

    def _window(self, epoch: int, number: int) -> Window:
        """The window, and the next of the epoch on its way."""
        wanted = {(epoch, number), (epoch, min(number + 1, len(self._windows) - 1))}
        self._read = {key: future for key, future in self._read.items() if key in wanted}
        for key in sorted(wanted):
            if key not in self._read:
                self._read[key] = self._reader.submit(self._load, *key, list(self._windows[key[1]]))
        return self._read[epoch, number].result()

    def _load(self, epoch: int, number: int, shards: list[int]) -> Window:
        texts: Window = []
        for shard in (self._shards.shards[index] for index in shards):
            texts.extend(zip(range(shard.first, shard.first + shard.rows), self._shards.read(shard), strict=True))
        random.Random(f"{self._seed}/{epoch}/{number}").shuffle(texts)
        return texts
