"""Limits on a run's metrics."""

from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from pilaf_ray.config.base import Section


class GuardConfig(Section):
    """One limit."""

    policy: Literal["warn", "pause", "rollback", "stop"] = "warn"
    """warn; pause: save and end; rollback: back to the checkpoint, without this step's pairs; stop: an error."""
    limit: float | None = Field(default=None, gt=0)
    """Where the guard speaks up; null turns it off."""
    window: int = Field(default=10, ge=1)
    """Steps that it looks at; it is silent until so many are done."""


class NonFiniteConfig(Section):
    """A step whose loss or gradient is NaN or infinite; its batch is saved in any case.

    There is no ``warn``, because such a step cannot be taken, and the learner that tried it must be loaded again.
    """

    policy: Literal["stop", "rollback", "pause"] = "stop"
    """stop: an error; rollback: back to the checkpoint, without this step's pairs; pause: end, saving nothing more."""


class GuardsSection(Section):
    """Guards against a run that learns nothing any more, or the wrong thing."""

    non_finite: NonFiniteConfig = NonFiniteConfig()
    """A loss or gradient that is no number."""
    loss_spike: GuardConfig = GuardConfig(limit=5.0)
    """limit: the loss as a multiple of the median before it; silent where that is ≤ 0, often with ppo, rloo, grpo."""
    kl_runaway: GuardConfig = GuardConfig()
    """limit: mean of kl/policy over the window, in nats."""
    reward_collapse: GuardConfig = GuardConfig()
    """limit: how far the mean of reward/policy over the window lies below the best one, on the oracle's scale."""
    length_explosion: GuardConfig = GuardConfig()
    """limit: mean of response/tokens over the window as a multiple of the first window's."""
    no_step_minutes: float | None = Field(default=60.0, gt=0)
    """An alarm, and nothing else, where training has made no step for so long, whatever it waits for; null: none."""
    webhook: str | None = None
    """URL that gets {run, event, message} as JSON by POST, of guards {guard, policy, step} too; see operations.md."""

    @field_validator("webhook")
    @classmethod
    def _can_be_posted_to(cls, url: str | None) -> str | None:
        # The URL itself is not repeated: whoever knows it may post there.
        if url is not None and not _is_web_address(url):
            raise ValueError("not a URL that can be posted to: write it as in https://hooks.example/alarms")
        return url

    @property
    def policies(self) -> Mapping[str, str]:
        """The policy of each guard, by name."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: section.policy
            for name, section in sections.items()
            if isinstance(section, GuardConfig | NonFiniteConfig)
        }


def _is_web_address(url: str) -> bool:
    if not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc:  # urllib would take a name and a password for a host and its port
            return False
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address between them, a port that is no number
        return False


def check_guards(guards: GuardsSection, *, rollouts: str | None) -> None:
    """Refuse policies that would change nothing.

    Args:
        rollouts: ``algorithm.type`` where the policy learns from rollouts, whose plan is a function of the step.

    Raises:
        ValueError: the run would go back to do the same again.
    """
    for name, policy in guards.policies.items():
        if rollouts is not None and policy == "rollback":
            raise ValueError(
                f"guards.{name}.policy: rollback does the same again with algorithm.type: {rollouts}, whose rollouts "
                "do not depend on the pairs that it sets aside: set it to pause or stop"
            )


def idle_guards(guards: GuardsSection, *, rollouts: str | None) -> list[str]:
    """Guards that were asked for and can seldom speak; one line each. ``rollouts`` as in :func:`check_guards`."""
    if rollouts is None or "loss_spike" not in guards.model_fields_set or guards.loss_spike.limit is None:
        return []
    return [
        "guards.loss_spike is silent where the median of the loss is not positive, as it often is with "
        f"algorithm.type: {rollouts}: set guards.kl_runaway or guards.reward_collapse as well"
    ]
