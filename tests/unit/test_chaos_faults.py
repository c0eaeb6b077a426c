"""When a run under faults counts as whole again."""

import pytest

from benchmarks.chaos_faults import roles_missing


@pytest.mark.parametrize(
    ("events", "missing"),
    [
        ([], 0),
        (["replica lost", "weights"], 1),
        (["replica lost", "learner lost", "replica replaced"], 1),
        (["replica lost", "learner lost", "learner rebuilt", "replica replaced"], 0),
        # One whose loss was before the first event that is looked at.
        (["replica replaced", "replica lost"], 1),
        # The controller was killed while a generator was missing: whoever starts again starts it as well.
        (["replica lost", "replacement failed", "controller lost", "run started", "roles ready", "weights"], 0),
        (["replica lost", "controller lost", "controller lost", "roles ready", "replica lost"], 1),
        (["controller lost", "run started"], 1),
    ],
)
def test_losses_are_made_good_one_by_one_or_all_by_a_new_start(events: list[str], missing: int) -> None:
    assert roles_missing(events) == missing
