"""What a run is called, what ends it, and in which rhythm it samples and trains."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from pilaf_ray.config.base import Section

NO_STEP_LIMIT = 10**9
"""``run.max_steps`` where another limit ends the run."""


class RunSection(Section):
    """What the run is called and when it ends: at whichever limit it reaches first, and it says which."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run and of its folder."""
    folder: str = "runs"
    """Where run folders live."""
    seed: int = 0
    """Every random choice derives from it."""
    max_steps: int = Field(default=NO_STEP_LIMIT, ge=1)
    """Optimiser steps; may be left out where another limit, or the number of rounds, ends the run."""
    max_labels: int | None = Field(default=None, ge=1)
    """Labels of trained pairs, two responses that the oracle read being one; whole batches, or rounds, are trained."""
    max_generated_tokens: int | None = Field(default=None, ge=1)
    """Tokens sampled for trained pairs, candidates included, rollouts not; the step that gets there is the last."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Wall time of training over all attempts; the run ends after the step under way."""
    restarts: int = Field(default=0, ge=0)
    """So often in a row a controller that died is started again, to go on from the newest checkpoint."""

    @field_validator("max_steps", "max_labels", "max_generated_tokens", "max_seconds", mode="before")
    @classmethod
    def _buys_something(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"a budget of {value} trains nothing: give more than 0, or leave {info.field_name} out")
        return value


class OnlineScheduleConfig(Section):
    """Continuous: every pair is trained on once, every step is handed to the generators."""

    type: Literal["online"] = "online"
    """Discriminator."""


class IterativeScheduleConfig(Section):
    """Rounds: sample a whole set with a frozen policy, label it, train on it, go on with the policy that comes out."""

    type: Literal["iterative"] = "iterative"
    """Discriminator."""
    rounds: int = Field(ge=1)
    """Number of rounds."""
    pairs_per_round: int = Field(ge=1)
    """Pairs of one round; a multiple of learner.batch_pairs."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the pairs of a round; the first one begins while the rest of the set is sampled."""
    reset_reference: bool = False
    """Each round has its starting policy as reference of sampler, loss and reported KL; all roles start anew for it."""


ScheduleConfig = Annotated[OnlineScheduleConfig | IterativeScheduleConfig, Field(discriminator="type")]


def round_steps(schedule: IterativeScheduleConfig, batch_pairs: int) -> int:
    """Optimiser steps of a round; raises ValueError where a round is not whole batches."""
    if schedule.pairs_per_round % batch_pairs:
        down = max(batch_pairs, schedule.pairs_per_round // batch_pairs * batch_pairs)
        raise ValueError(
            f"schedule.pairs_per_round = {schedule.pairs_per_round} is no multiple of learner.batch_pairs = "
            f"{batch_pairs}: take {down}, say"
        )
    return schedule.epochs * schedule.pairs_per_round // batch_pairs


def step_limit(
    run: RunSection, schedule: OnlineScheduleConfig | IterativeScheduleConfig, *, batch_pairs: int, pair_labels: float
) -> tuple[int, str]:
    """The last optimiser step that can be known beforehand, and the setting that it comes from.

    Args:
        pair_labels: labels that a pair costs.

    Raises:
        ValueError: the limits buy no step.
    """
    limits = [(run.max_steps, "run.max_steps")]
    unit_pairs, unit_steps, unit = batch_pairs, 1, "batch"
    if isinstance(schedule, IterativeScheduleConfig):
        unit_pairs, unit_steps, unit = schedule.pairs_per_round, round_steps(schedule, batch_pairs), "round"
        limits.append((schedule.rounds * unit_steps, "schedule.rounds"))
    if run.max_labels is not None:
        units = int(run.max_labels // (unit_pairs * pair_labels))
        if units == 0:
            raise ValueError(
                f"run.max_labels = {run.max_labels} buys less than one {unit} of {unit_pairs} pairs at {pair_labels:g} "
                f"labels a pair: give {unit_pairs * pair_labels:g} or more"
            )
        limits.append((units * unit_steps, "run.max_labels"))
    return min(limits, key=lambda limit: limit[0])
