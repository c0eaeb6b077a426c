"""Limits on metrics, against series worked out by hand."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pilaf_ray.build import guard_rules
from pilaf_ray.config.loader import load_config
from pilaf_ray.observability.alerts import Webhook
from pilaf_ray.pipeline.guards import Alarm, GuardRule, Measure, NumericGuards, StepClock

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def rule(measure: Measure, limit: float, window: int = 3, **changes: Any) -> GuardRule:
    given: dict[str, Any] = {"name": "guard", "key": "x", "policy": "warn", **changes}
    return GuardRule(measure=measure, limit=limit, window=window, **given)


def alarms(guard: GuardRule, values: list[float | None], start: int = 1) -> list[int]:
    guards = NumericGuards([guard])
    raised: list[Alarm] = []
    for step, value in enumerate(values, start):
        raised += guards.check({"step": step, "x": value})
    return [alarm.step for alarm in raised]


@pytest.mark.parametrize(
    ("guard", "values", "expected"),
    [
        # 4 > 3 · median(1, 1, 2); the window must be full first; one alarm until it is over, then another.
        (rule(Measure.TIMES_MEDIAN, 3), [9, 1, 1, 2, 4, 5, 2, 99], [5, 8]),
        (rule(Measure.TIMES_MEDIAN, 3), [1, 1, 99], []),
        # Means of three: 2, 3, 5, 4: above 4 at step 5 only.
        (rule(Measure.MEAN, 4), [1, 2, 3, 4, 8, 0], [5]),
        # First window 2; means of three 2, 4, 6: more than twice at step 5.
        (rule(Measure.TIMES_START, 2.5), [2, 2, 2, 8, 8], [5]),
        # Means of three: 1, 2, 3, 2, 1 1/3: 1.67 below the best at the end.
        (rule(Measure.DROP, 1.5), [1, 1, 1, 4, 4, -2, 2], [7]),
        (rule(Measure.DROP, 0.5), [1, 2, 3, 4, 5, 6], []),
        # A missing value neither alarms nor counts.
        (rule(Measure.MEAN, 4), [5, None, 5, None, 5], [5]),
    ],
)
def test_measures(guard: GuardRule, values: list[float | None], expected: list[int]) -> None:
    assert alarms(guard, values) == expected


def test_a_repeated_step_replaces_what_was_known_of_it() -> None:
    guards = NumericGuards([rule(Measure.MEAN, 4, window=2)])
    assert guards.check({"step": 1, "x": 1.0}) == []
    assert guards.check({"step": 2, "x": 9.0})[0].message == (
        "step 2: x is 9, its mean over 2 steps is 5; guards.guard.limit is 4 (policy: warn)"
    )
    assert guards.check({"step": 2, "x": 3.0}) == []
    assert guards.check({"step": 3, "x": 5.0}) == [], "mean of 3 and 5, not of 9 and 5"


def test_other_keys_are_not_looked_at() -> None:
    assert NumericGuards([rule(Measure.MEAN, 1, window=1)]).check({"step": 1, "y": 5.0}) == []


def test_an_alarm_is_posted_and_a_dead_webhook_does_no_harm() -> None:
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    alarm = Alarm(guard="kl_runaway", policy="warn", step=3, message="far")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        sending = Webhook(url, run="r").send(alarm)
        server.handle_request()
        assert sending is not None
        sending.join()
    assert seen == [{"run": "r", "guard": "kl_runaway", "policy": "warn", "step": 3, "message": "far"}]
    refused = Webhook(url, run="r").send(alarm)
    assert refused is not None
    refused.join()
    assert Webhook(None, run="r").send(alarm) is None


def test_configured_guards_become_rules() -> None:
    config = load_config(TINY, ["guards.kl_runaway={limit: 30, policy: rollback, window: 4}"])
    assert guard_rules(config) == [
        rule(Measure.TIMES_MEDIAN, 5.0, 10, name="loss_spike", key="loss"),
        rule(Measure.MEAN, 30.0, 4, name="kl_runaway", key="kl/policy", policy="rollback"),
    ]


def test_the_alarm_without_steps_comes_once_and_only_while_steps_are_expected() -> None:
    now = 0.0
    steps = StepClock(10.0, clock=lambda: now)
    raised = []
    for now, happens in [
        *((0, None), (5000, None)),  # models load
        *((5000, "begin"), (5600, None), (5601, None), (9000, None)),  # ten minutes are no alarm, a second more is
        *((9000, 1), (9300, 2), (9899, None), (9901, None)),  # step 2 is ten minutes old
        *((9902, "end"), (20000, None)),
    ]:
        if happens == "begin":
            steps.begin()
        elif happens == "end":
            steps.end()
        elif isinstance(happens, int):
            assert steps.stepped(happens) == (happens == 1), "the first step ends the alarm"
        alarm = steps.look()
        raised += [(now, alarm.step, alarm.policy)] if alarm else []
    assert raised == [(5601, 0, "warn"), (9901, 2, "warn")]
    silent = StepClock(None, clock=lambda: now)
    silent.begin()
    now = 1e9
    assert silent.look() is None
