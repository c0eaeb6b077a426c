"""Busy shares are counted from the beginning that was set, with a clock of the test's own."""

from types import SimpleNamespace

from pilaf_ray.observability.activity import RoleActivity
from pilaf_ray.observability.busy import BusyMeter


def test_shares_count_from_the_beginning_and_calls_are_those_under_way() -> None:
    now = [100.0]
    meter = BusyMeter(clock=lambda: now[0])
    activity = RoleActivity(lambda: {"learner": SimpleNamespace(meter=meter)}, clock=lambda: now[0])
    with meter.call():
        now[0] += 7.0
    activity.begin()
    now[0] += 3.0
    with meter.call():
        now[0] += 1.0
        assert activity.lines() == {"learner": (1, 0.25)}
    assert (activity.seconds, activity.utilization(), activity.busy()) == (4.0, {"learner": 0.25}, {"learner": 8.0})


def test_before_any_role_has_started_there_is_nothing_to_show() -> None:
    assert RoleActivity(dict).lines() == {}
