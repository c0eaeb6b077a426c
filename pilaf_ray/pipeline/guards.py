"""Does the run still learn? Limits on its metrics, and what is done when one is passed. Pure."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from statistics import fmean, median
from typing import Literal

GuardPolicy = Literal["warn", "pause", "rollback", "stop"]


class Measure(StrEnum):
    """How a metric is held against its limit."""

    TIMES_MEDIAN = "times_median"
    """The newest value, as a multiple of the median of the window before it."""
    TIMES_START = "times_start"
    """The window's mean, as a multiple of the mean of the run's first window."""
    MEAN = "mean"
    """The window's mean."""
    DROP = "drop"
    """How far the window's mean lies below the best one of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardRule:
    """One limit; the guard is silent until ``window`` steps are known.

    Example: ``GuardRule(name="loss_spike", key="loss", measure=Measure.TIMES_MEDIAN, limit=5, window=10,
    policy="warn")``
    """

    name: str
    key: str
    measure: Measure
    limit: float
    window: int
    policy: GuardPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """A limit was passed at this step, and was not at the one before."""

    guard: str
    policy: GuardPolicy
    step: int
    message: str


class NumericGuards:
    """Watches the metrics of one run, step by step; a step that is repeated replaces what was known of it."""

    def __init__(self, rules: Sequence[GuardRule]) -> None:
        self._rules = list(rules)
        self._history: dict[str, list[tuple[int, float]]] = {rule.name: [] for rule in rules}
        self._alarmed: set[str] = set()

    def check(self, metrics: Mapping[str, float | None]) -> list[Alarm]:
        """Alarms that ``metrics`` of the next step raise; a missing value is no reason for one."""
        step = int(metrics["step"] or 0)
        alarms = []
        for rule in self._rules:
            value = metrics.get(rule.key)
            history = [item for item in self._history[rule.name] if item[0] < step]
            self._history[rule.name] = history
            if value is None:
                continue
            measured = self._measure(rule, [known for _, known in history], value)
            history.append((step, value))
            if measured is None or measured <= rule.limit:
                self._alarmed.discard(rule.name)
            elif rule.name not in self._alarmed:
                self._alarmed.add(rule.name)
                alarms.append(
                    Alarm(
                        guard=rule.name, policy=rule.policy, step=step, message=_describe(rule, step, value, measured)
                    )
                )
        return alarms

    @staticmethod
    def _measure(rule: GuardRule, before: Sequence[float], value: float) -> float | None:
        values = [*before, value]
        if rule.measure == Measure.TIMES_MEDIAN:
            if len(before) < rule.window:
                return None
            usual = median(before[-rule.window :])
            return value / usual if usual > 0 else None
        if len(values) < rule.window:
            return None
        now = fmean(values[-rule.window :])
        if rule.measure == Measure.MEAN:
            return now
        if rule.measure == Measure.TIMES_START:
            start = fmean(values[: rule.window])
            return now / start if start > 0 else None
        sums = list(accumulate(values, initial=0.0))
        best = max(sums[end] - sums[end - rule.window] for end in range(rule.window, len(sums))) / rule.window
        return best - now


class StepClock:
    """Whether steps still come, whatever it is that the run waits for.

    Args:
        minutes: without a step, after which :meth:`look` raises the alarm; None for never.
    """

    def __init__(self, minutes: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes, self._clock = minutes, clock
        self._since: float | None = None
        self._alarmed = False
        self._step = 0

    def begin(self) -> None:
        """From now on steps are expected."""
        self._since, self._alarmed = self._clock(), False

    def end(self) -> None:
        """No more steps are expected."""
        self._since = None

    def stepped(self, step: int) -> bool:
        """A step is done; returns whether the alarm was raised before it."""
        alarmed = self._alarmed
        self._step = step
        self.begin()
        return alarmed

    def look(self) -> Alarm | None:
        """The alarm, once for each time without a step that is too long."""
        if self._since is None or self._minutes is None or self._alarmed:
            return None
        passed = (self._clock() - self._since) / 60
        if passed <= self._minutes:
            return None
        self._alarmed = True
        message = f"no step for {passed:.3g} minutes; guards.no_step_minutes is {self._minutes:g} (policy: warn)"
        return Alarm(guard="no_step", policy="warn", step=self._step, message=message)


def _describe(rule: GuardRule, step: int, value: float, measured: float) -> str:
    mean = f"its mean over {rule.window} steps is"
    what = {
        Measure.TIMES_MEDIAN: f"{measured:.3g} times the median of the {rule.window} steps before",
        Measure.TIMES_START: f"{mean} {measured:.3g} times that of the first {rule.window}",
        Measure.MEAN: f"{mean} {measured:.3g}",
        Measure.DROP: f"{mean} {measured:.3g} below its best",
    }[rule.measure]
    return (
        f"step {step}: {rule.key} is {value:.4g}, {what}; guards.{rule.name}.limit is {rule.limit:g} "
        f"(policy: {rule.policy})"
    )
