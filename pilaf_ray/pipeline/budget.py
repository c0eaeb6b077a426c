"""What a run may spend, and which of its limits ended it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pilaf_ray.types import LabeledPair


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What a run has spent, over all of its attempts."""

    labels: float = 0.0
    """Half the responses that the oracle has read for trained pairs: 1 a pair, unless it ranks candidates."""
    generated_tokens: float = 0.0
    """Tokens sampled for trained pairs, candidates included."""
    seconds: float = 0.0
    """Wall time of the training loop."""


class RunBudget:
    """Limits of a run; whichever is reached first ends it.

    Args:
        max_steps: the last step, and ``steps_reason`` the setting that it comes from.
        max_generated_tokens: the run ends after the step that reaches it. Pairs in flight then are not counted.
        max_seconds: of the training loop; the run ends after the step under way.
        spent: by earlier attempts.
    """

    def __init__(
        self,
        *,
        max_steps: int,
        steps_reason: str = "run.max_steps",
        max_generated_tokens: float | None = None,
        max_seconds: float | None = None,
        spent: Spent | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_steps = max_steps
        self._steps_reason = steps_reason
        self._max_tokens = max_generated_tokens
        self._max_seconds = max_seconds
        self._before = spent or Spent()
        self._labels, self._tokens = self._before.labels, self._before.generated_tokens
        self._clock = clock
        self._started = clock()

    @property
    def spent(self) -> Spent:
        """Everything up to now."""
        seconds = self._before.seconds + self._clock() - self._started
        return Spent(labels=self._labels, generated_tokens=self._tokens, seconds=seconds)

    @property
    def seconds_left(self) -> float | None:
        """Until the time is over; None without a limit."""
        return None if self._max_seconds is None else self._max_seconds - self.spent.seconds

    def count(self, pairs: Sequence[LabeledPair]) -> None:
        """Pairs are trained on for the first time."""
        for item in pairs:
            draw = item.pair.draw
            lengths = len(item.pair.a.token_ids) + len(item.pair.b.token_ids)
            self._labels += 1.0 if draw is None else draw.cost.labelled_responses / 2
            self._tokens += lengths if draw is None else draw.cost.generated_tokens

    def ended_by(self, step: int) -> str | None:
        """The setting whose limit is reached when ``step`` steps are taken, if one is."""
        if step >= self.max_steps:
            return self._steps_reason
        if self._max_tokens is not None and self._tokens >= self._max_tokens:
            return "run.max_generated_tokens"
        if self.seconds_left is not None and self.seconds_left <= 0:
            return "run.max_seconds"
        return None
