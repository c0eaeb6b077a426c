"""Counts of kept drafts, and the window that follows from them."""

import pytest
import torch

from pilaf_ray.engines.draft_counts import MEMORY, REFERENCE_COST, DraftCounter, best_window
from pilaf_ray.types import DraftCounts


def cheapest(rate: float, limit: int) -> int:
    """By following one request for 200 steps of expectation: tokens won, forwards paid."""

    def price(window: int) -> float:
        won, alive = 0.0, 1.0
        for _ in range(window):
            won += alive
            alive *= rate
        return (window + REFERENCE_COST) / won

    return min(range(1, limit + 1), key=price)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.8, 0.9, 0.97, 1.0])
def test_the_window_has_the_cheapest_token(rate: float) -> None:
    assert best_window(rate, limit=16) == cheapest(rate, 16)


def test_windows_at_the_ends() -> None:
    assert best_window(1.0, limit=8) == 8
    assert best_window(0.0, limit=8) == 1
    assert best_window(1.0, limit=1) == 1


def test_the_running_rate_follows_what_was_judged() -> None:
    counter = DraftCounter()
    assert counter.rate() == 1.0
    counter.add(drafted=8, judged=4, kept=torch.tensor([True, True, True, False]), passes=2)
    assert counter.rate() == pytest.approx(1.0 - 0.25 * 4 / MEMORY)
    assert counter.rate() == pytest.approx(1.0 - 0.25 * 4 / MEMORY)
    counter.add(drafted=MEMORY, judged=MEMORY, kept=torch.arange(MEMORY) < MEMORY // 2, passes=1)
    assert counter.rate() == 0.5
    assert (counter.drafted, counter.judged, counter.kept, counter.passes) == (
        MEMORY + 8,
        MEMORY + 4,
        MEMORY // 2 + 3,
        3,
    )


def test_what_counts_say() -> None:
    counts = DraftCounts(drafted=16, judged=12, kept=9, passes=4)
    assert (counts.acceptance, counts.tokens_per_pass) == (0.75, 3.0)
    nothing = DraftCounts(drafted=0, judged=0, kept=0, passes=0)
    assert (nothing.acceptance, nothing.tokens_per_pass) == (1.0, 1.0)
