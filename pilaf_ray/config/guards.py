"""Limits on a run's metrics."""

from typing import Literal

from pydantic import Field

from pilaf_ray.config.base import Section


class GuardConfig(Section):
    """One limit."""

    policy: Literal["warn", "pause", "rollback", "stop"] = "warn"
    """warn; pause: save and end; rollback: back to the checkpoint, without this step's pairs; stop: an error."""
    limit: float | None = Field(default=None, gt=0)
    """Where the guard speaks up; null turns it off."""
    window: int = Field(default=10, ge=1)
    """Steps that it looks at; it is silent until so many are done."""


class GuardsSection(Section):
    """Guards against a run that learns nothing any more, or the wrong thing."""

    loss_spike: GuardConfig = GuardConfig(limit=5.0)
    """limit: the loss as a multiple of the median over the window before it."""
    kl_runaway: GuardConfig = GuardConfig()
    """limit: mean of kl/policy over the window, in nats."""
    reward_collapse: GuardConfig = GuardConfig()
    """limit: how far the mean of reward/policy over the window lies below the best one, on the oracle's scale."""
    length_explosion: GuardConfig = GuardConfig()
    """limit: mean of response/tokens over the window as a multiple of the first window's."""
    no_step_minutes: float | None = Field(default=60.0, gt=0)
    """An alarm, and nothing else, where training has made no step for so long, whatever it waits for; null: none."""
    webhook: str | None = None
    """URL that gets a JSON object {run, guard, policy, step, message} of each alarm by POST."""
