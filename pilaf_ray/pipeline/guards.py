"""Does the run still learn? Limits on its metrics, and what is done when one is passed. Pure."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median
from typing import Literal

GuardPolicy = Literal["warn", "pause", "rollback", "stop"]

BY_SEVERITY: Sequence[GuardPolicy] = ("stop", "rollback", "pause", "warn")
"""Where several guards speak at one step, the first of these is what happens."""


class Measure(StrEnum):
    """How a metric is held against its limit."""

    TIMES_MEDIAN = "times_median"
    """The newest value, as a multiple of the median of the window before it; silent where that is not positive."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """A step as one guard knows it."""

    step: int
    value: float
    best: float | None
    """The largest mean of a whole window up to here; None before the first."""
    over: bool
    """Whether the limit was passed."""


class NumericGuards:
    """Watches the metrics of one run, step by step.

    A step that is repeated replaces what was known of it and of later ones: passing the limit again is told again.
    """

    def __init__(self, rules: Sequence[GuardRule]) -> None:
        self._rules = list(rules)
        self._history: dict[str, list[_Seen]] = {rule.name: [] for rule in rules}

    def remember(self, steps: Iterable[Mapping[str, float | None]]) -> None:
        """Take in the metrics of steps that an earlier attempt took; their alarms were its own."""
        for metrics in steps:
            self.check(metrics)

    def check(self, metrics: Mapping[str, float | None]) -> list[Alarm]:
        """Alarms that ``metrics`` of the next step raise; a missing value is no reason for one."""
        step = int(metrics["step"] or 0)
        found = (self._check(rule, step, metrics.get(rule.key)) for rule in self._rules)
        return [alarm for alarm in found if alarm is not None]

    def _check(self, rule: GuardRule, step: int, value: float | None) -> Alarm | None:
        history = self._history[rule.name]
        while history and history[-1].step >= step:
            history.pop()
        if value is None:
            return None
        last = [seen.value for seen in history[-rule.window :]]
        window = [*last, value][-rule.window :]
        before = history[-1].best if history else None
        mean = fmean(window) if len(window) == rule.window else None
        best = max((known for known in (before, mean) if known is not None), default=None)
        if rule.measure is Measure.TIMES_MEDIAN:
            measured = _times(value, median(last)) if len(last) == rule.window else None
        elif mean is None or best is None or rule.measure is Measure.MEAN:
            measured = mean
        elif rule.measure is Measure.TIMES_START:
            first = [seen.value for seen in history[: rule.window]]
            measured = _times(mean, fmean([*first, value][: rule.window]))
        else:
            measured = best - mean
        over = measured is not None and measured > rule.limit
        told = bool(history) and history[-1].over
        history.append(_Seen(step=step, value=value, best=best, over=over))
        if measured is None or not over or told:
            return None
        return Alarm(guard=rule.name, policy=rule.policy, step=step, message=_describe(rule, step, value, measured))


def _times(value: float, unit: float) -> float | None:
    """``value`` as a multiple of ``unit``; None where that says nothing."""
    return value / unit if unit > 0 else None


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
