"""Which labelled pairs the reward model trains on, and how often."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from pilaf_ray.types import LabeledPair


@dataclass(slots=True)
class _Entry:
    item: LabeledPair
    uses: int = 0


@dataclass(slots=True)
class ReplayWindow:
    """The newest pairs in plan order, each handed out at most ``uses`` times.

    What it hands out depends on the pairs and their uses only, so a window that is
    rebuilt from the ledger goes on as the one before it would have.

    Example: ``window = ReplayWindow(window_pairs=512, uses=4); window.add(pairs); window.take(8)``
    """

    window_pairs: int
    uses: int
    _entries: dict[int, _Entry] = field(default_factory=dict)

    def add(self, items: Iterable[LabeledPair]) -> None:
        """Take new pairs in; the oldest beyond ``window_pairs`` leave."""
        self.restore((item, 0) for item in items)

    def restore(self, items: Iterable[tuple[LabeledPair, int]]) -> None:
        """Take pairs in with the uses that they had before."""
        for item, uses in items:
            self._entries.setdefault(item.pair.plan.index, _Entry(item, uses))
        for index in sorted(self._entries)[: -self.window_pairs]:
            del self._entries[index]

    def take(self, pairs: int) -> list[tuple[LabeledPair, int]] | None:
        """The next batch, each pair with its number of uses, this one counted; None while too few have uses left.

        Least used pairs come first and older ones before newer, so that every pair has had
        one turn before any has two.
        """
        left = [(entry.uses, index) for index, entry in self._entries.items() if entry.uses < self.uses]
        if len(left) < pairs:
            return None
        chosen = [self._entries[index] for _, index in sorted(left)[:pairs]]
        for entry in chosen:
            entry.uses += 1
        return [(entry.item, entry.uses) for entry in chosen]
