"""How patient a run is with its roles."""

from pydantic import Field

from pilaf_ray.config.base import Section


class SupervisionSection(Section):
    """What is done about roles that die, hang or fail."""

    failures_in_a_row: int = Field(default=5, ge=1)
    """So many failures of one replica, or of the learner, without a success between them end the run."""
    first_pause_seconds: float = Field(default=1.0, ge=0)
    """Before the second replacement in a row; it doubles from there. The first comes at once."""
    longest_pause_seconds: float = Field(default=60.0, ge=0)
    """Where the doubling ends."""
    heartbeat_every_seconds: float = Field(default=5.0, gt=0)
    """Between two questions to each role whether it lives."""
    heartbeat_seconds: float = Field(default=60.0, gt=0)
    """A role that answers none for so long is stopped or stuck, not slow: it is replaced."""
    stuck_seconds: float = Field(default=300.0, gt=0)
    """A role that answers but gets no further with its work for so long is stuck, not slow: it is replaced."""
    oracle_outage_seconds: float = Field(default=300.0, ge=0)
    """How long an oracle may be out of reach before the run ends; sampling goes on up to the staleness bound."""
