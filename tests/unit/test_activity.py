"""Busy shares are counted from the beginning that was set, with a clock of the test's own."""

from types import SimpleNamespace

from pilaf_ray.observability.activity import RoleActivity
from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.observability.run_status import Pulse, ReplicaStatus, RoleStatus


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


def test_states_name_every_replica_and_time_counts_only_where_it_should() -> None:
    replica = ReplicaStatus(number=0, serving=True, pulse=Pulse(time=9.0, memory_mib=5.0))
    role = SimpleNamespace(meter=BusyMeter(clock=lambda: 0.0), replicas=[replica])
    activity = RoleActivity(lambda: {"oracle": role}, others=lambda: {"store": role}, clock=lambda: 0.0)
    assert activity.states() == [
        RoleStatus(role="oracle", in_flight=0, busy=0.0, replicas=(replica,)),
        RoleStatus(role="store", in_flight=0, busy=None, replicas=(replica,)),
    ]


def test_before_any_role_has_started_there_is_nothing_to_show() -> None:
    assert RoleActivity(dict).lines() == {}
