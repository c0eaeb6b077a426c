"""What a run does when its numbers go wrong: its guards, and what each one's policy asks for."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from pilaf_ray import build
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import GuardError, NonFiniteLossError, PauseError, PilafError, RollbackError, first_cause
from pilaf_ray.pipeline.guards import BY_SEVERITY, Alarm, NumericGuards
from pilaf_ray.pipeline.ports import LearnerPort
from pilaf_ray.types import LabeledPair, StepResult


class RunGuards:
    """Holds a run's metrics against their limits, and what its learner says of a step that is no step.

    Args:
        tell: is given every alarm, before anything follows from it.
    """

    def __init__(self, config: RunConfig, *, tell: Callable[[Alarm], None]) -> None:
        self._numeric = NumericGuards(build.guard_rules(config))
        self._non_finite = config.guards.non_finite.policy
        self._tell = tell
        self.set_aside: list[tuple[str, str]] = []
        """(id, reason) of the pairs that the checkpoint is gone back to without."""

    def remember(self, steps: Iterable[Mapping[str, float | None]]) -> None:
        """Take in the metrics of the steps that earlier attempts took; what passed a limit there was told then."""
        self._numeric.remember(steps)

    def look(
        self, metrics: Mapping[str, float | None], batch: Sequence[LabeledPair], *, pause: Callable[[str], None]
    ) -> None:
        """Look at the ``metrics`` of a step on ``batch``, and do what the severest policy of its alarms says.

        Args:
            pause: asked to save and end the run, with the reason.

        Raises:
            GuardError: the policy is to stop.
            RollbackError: it is to go back; :attr:`set_aside` has the batch.
        """
        alarms = self._numeric.check(metrics)
        for alarm in alarms:
            self._tell(alarm)
        if not alarms:
            return
        severest = min(alarms, key=lambda alarm: BY_SEVERITY.index(alarm.policy))
        if severest.policy == "stop":
            raise GuardError(severest.message)
        if severest.policy == "rollback":
            raise self._going_back(severest, batch)
        if severest.policy == "pause":
            pause(severest.message)

    def over(self, learner: LearnerPort) -> LearnerPort:
        """``learner``, with ``guards.non_finite`` for the steps that it cannot take."""
        return _GuardedLearner(learner, refused=self._refused)

    def _refused(self, step: int, batch: Sequence[LabeledPair], error: NonFiniteLossError) -> PilafError:
        """What is raised in the place of ``error``, or ``error`` itself."""
        policy = self._non_finite
        message = f"{error} (guards.non_finite.policy: {policy})"
        alarm = Alarm(guard="non_finite", policy=policy, step=step, message=message)
        self._tell(alarm)
        if policy == "rollback":
            return self._going_back(alarm, batch)
        return PauseError(message) if policy == "pause" else error

    def _going_back(self, alarm: Alarm, batch: Sequence[LabeledPair]) -> RollbackError:
        self.set_aside = [(item.pair_id, alarm.message) for item in batch]
        return RollbackError(alarm.message)


class _GuardedLearner:
    """A learner whose steps that are none are somebody's to judge."""

    def __init__(
        self,
        learner: LearnerPort,
        *,
        refused: Callable[[int, Sequence[LabeledPair], NonFiniteLossError], PilafError],
    ) -> None:
        self._learner = learner
        self._refused = refused

    async def train_step(self, step: int, batch: Sequence[LabeledPair]) -> StepResult:
        """The learner's step; raises what the policy makes of a loss that is not finite."""
        try:
            return await self._learner.train_step(step, batch)
        except (NonFiniteLossError, ExceptionGroup) as error:
            # A policy and a reward model that step together end as a group.
            cause = first_cause(error)
            if not isinstance(cause, NonFiniteLossError):
                raise
            raise self._refused(step, batch, cause) from cause
