"""Limits on metrics, against series worked out by hand."""

import logging
from pathlib import Path
from typing import Any

import pytest
from webhook_inbox import open_inbox

from pilaf_ray.build import guard_rules
from pilaf_ray.config.loader import load_config
from pilaf_ray.errors import ConfigError
from pilaf_ray.observability.alerts import Alert, EventAlerts, Webhook
from pilaf_ray.observability.sinks import EventLog
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
        # Nothing is a multiple of a median that is not positive.
        (rule(Measure.TIMES_MEDIAN, 3), [-1, 0, 0, 99], []),
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


def test_a_repeated_step_that_passes_the_limit_again_is_told_again() -> None:
    guards = NumericGuards([rule(Measure.TIMES_MEDIAN, 3, window=2)])

    def told(step: int, value: float) -> bool:
        return bool(guards.check({"step": step, "x": value}))

    assert [told(step, 1.0) for step in (1, 2, 3)] == [False] * 3
    assert told(4, 9.0)
    assert told(4, 8.0), "back to step 3, over the limit again"
    assert not told(5, 20.0), "4.4 times the median of 1 and 8, as at the step before"
    assert not told(3, 1.0)
    assert told(4, 7.0), "back to step 2"


def test_the_steps_of_an_earlier_attempt_are_known_and_their_alarms_are_not_told_again() -> None:
    rules = [
        rule(Measure.TIMES_START, 2, window=2, name="start"),
        rule(Measure.DROP, 2, window=2, name="best"),
        rule(Measure.MEAN, 6, window=2, name="mean"),
    ]
    guards = NumericGuards(rules)
    # Means of two: 2, 3, 5, 7; the last two pass the limit of "start", the last one that of "mean".
    guards.remember({"step": step, "x": value} for step, value in enumerate([2.0, 2.0, 4.0, 6.0, 8.0], 1))
    assert guards.check({"step": 6, "x": 8.0}) == []
    # Mean 4.5: 2.25 times the start, and 3.5 below the best, which is 8.
    assert [alarm.guard for alarm in guards.check({"step": 7, "x": 1.0})] == ["best"]
    fresh = NumericGuards(rules)
    assert [fresh.check({"step": step, "x": value}) for step, value in ((6, 8.0), (7, 1.0))] == [[], []]


def test_other_keys_are_not_looked_at() -> None:
    assert NumericGuards([rule(Measure.MEAN, 1, window=1)]).check({"step": 1, "y": 5.0}) == []


def test_an_alert_is_posted_and_a_dead_webhook_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    alarm = Alarm(guard="kl_runaway", policy="warn", step=3, message="far")
    alert = Alert(event="guard", guard=alarm.guard, policy=alarm.policy, step=alarm.step, message=alarm.message)
    with open_inbox() as inbox:
        webhook = Webhook(inbox.url, run="r")
        webhook.send(alert)
        webhook.send(Alert(event="given up", message="oracle 0"))
        webhook.close()
        assert sorted(inbox.posts, key=len) == [
            {"run": "r", "event": "given up", "message": "oracle 0"},
            {"run": "r", "event": "guard", "guard": "kl_runaway", "policy": "warn", "step": 3, "message": "far"},
        ]
    dead = Webhook(inbox.url, run="r")
    dead.send(alert)
    dead.close()
    Webhook(None, run="r").send(alert)
    assert [record.getMessage()[:43] for record in caplog.records] == ["the alert did not reach guards.webhook: <ur"]


def test_the_last_alert_is_waited_for_but_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    with open_inbox() as inbox:
        inbox.answers.clear()
        webhook = Webhook(inbox.url, run="r")
        webhook.send(Alert(event="guard", message="far"))
        with caplog.at_level(logging.WARNING):
            webhook.close(seconds=0.0)
        assert "did not answer" in caplog.text
        inbox.answers.set()
        webhook.close()
        assert [post["message"] for post in inbox.posts] == ["far"]


def test_what_does_not_speak_http_is_a_webhook_that_is_away(caplog: pytest.LogCaptureFixture) -> None:
    with open_inbox() as inbox:
        inbox.speaks_http = False
        webhook = Webhook(inbox.url, run="r")
        webhook.send(Alert(event="guard", message="far"))
        webhook.close()
    assert "did not reach guards.webhook: what is this" in caplog.text


def test_events_that_nobody_should_miss_are_told_once_in_a_while() -> None:
    now, told = [0.0], list[Alert]()
    alerts = EventAlerts(told.append, clock=lambda: now[0])
    alerts("checkpoint", {"step": 1})
    alerts("oracle outage", {"attempt": 1, "cause": "the line is down"})
    alerts("oracle outage", {"attempt": 2, "cause": "the line is down"})
    alerts("given up", {"role": "generator", "replica": 0, "cause": "generator 0 failed 5 times in a row"})
    now[0] = 600.0
    alerts("oracle outage", {"attempt": 9, "cause": "still"})
    alerts("controller lost", {"step": 7, "cause": "killed by SIGKILL"})
    assert [(alert.event, alert.message) for alert in told] == [
        ("oracle outage", "the oracle is out of reach: the line is down"),
        ("given up", "generator 0 failed 5 times in a row"),
        ("oracle outage", "the oracle is out of reach: still"),
        ("controller lost", "the controller was lost after step 7: killed by SIGKILL"),
    ]


def test_the_newest_event_is_known_unless_it_is_half_a_line(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events.jsonl")
    assert events.newest() == {}
    events.record("checkpoint", path="x" * 100_000)
    events.record("controller lost", step=3)
    assert (events.newest()["event"], events.newest()["step"]) == ("controller lost", 3)
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"time": 1')
    assert events.newest() == {}


@pytest.mark.parametrize(
    "url",
    [
        "hooks.example/x",
        "ftp://hooks.example/x",
        "https://",
        "http://[::1/x",
        "http://h:port/",
        "http://h/ä",
        "http://h/a b",
        "https://u:p@h/x",
    ],
)
def test_a_webhook_that_cannot_be_posted_to_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"guards\.webhook: not a URL that can be posted to: write it as in"
    ) as refused:
        load_config(TINY, [f"guards.webhook={url!r}"])
    assert len(url) < 9 or url not in str(refused.value)
    fine = "https://hooks.example:8443/services/T0/B0?x=1"
    assert load_config(TINY, [f"guards.webhook={fine}"]).guards.webhook == fine


def test_going_back_is_refused_where_it_would_do_the_same_again() -> None:
    rollouts = ["algorithm={type: rloo}", "reward_model={}", "sampler={type: vanilla}"]
    for guard in ("kl_runaway={limit: 30, policy: rollback}", "non_finite={policy: rollback}"):
        name = guard.partition("=")[0]
        with pytest.raises(ConfigError, match=f"guards.{name}.policy: rollback does the same again with .*: rloo"):
            load_config(TINY, [*rollouts, f"guards.{guard}"])
        load_config(TINY, [f"guards.{guard}"])
    with pytest.raises(ConfigError, match=r"guards\.non_finite\.policy: Input should be 'stop', 'rollback' or 'pause'"):
        load_config(TINY, ["guards.non_finite.policy=warn"])
    asked = "guards.loss_spike={limit: 5, policy: pause}"
    (line,) = load_config(TINY, [*rollouts, asked]).idle_settings
    assert line.startswith("guards.loss_spike is silent where the median of the loss is not positive")
    assert load_config(TINY, rollouts).idle_settings == load_config(TINY, [asked]).idle_settings == []


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
