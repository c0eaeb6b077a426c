"""What every role says beside its work."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a role says beside its work.

    Example: ``Heartbeat(memory_mib=512.0, work="train_step", advances=7, idle_seconds=0.4)``
    """

    memory_mib: float
    """Resident memory of its process and of those that it started."""
    work: str = ""
    """Counted work that is under way."""
    advances: int = 0
    """Parts of work that its process has done; see :mod:`pilaf_ray.observability.progress`."""
    idle_seconds: float | None = None
    """Since the newest part, or since there is work again; None where standing still says nothing."""
