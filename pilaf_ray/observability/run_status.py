"""A run's own word on what it is doing, in a small file that others may read at any time."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

NAME = "status.json"
SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """A replica's newest heartbeat."""

    time: float
    """When it came; wall clock, seconds."""
    memory_mib: float
    """Resident memory of its process and of those that it started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaStatus:
    """One replica of a role, or one rank."""

    number: int
    serving: bool
    """False while it is being replaced."""
    pulse: Pulse | None = None
    """None before the first heartbeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleStatus:
    """What one role is doing."""

    role: str
    in_flight: int
    """Calls under way."""
    busy: float | None
    """Share of the training time with at least one call under way, in [0, 1]; None where it does not count."""
    replicas: tuple[ReplicaStatus, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """What a run said of itself at ``time`` (wall clock, seconds)."""

    time: float
    phase: str
    roles: tuple[RoleStatus, ...] = ()

    @property
    def waits_for(self) -> str | None:
        """What the learner waits for, None while it trains or nothing is known."""
        calls = {role.role: role.in_flight for role in self.roles}
        if self.phase != "training" or calls.get("learner"):
            return None
        if calls.get("oracle"):
            return "labels"
        return "responses" if calls.get("generator") else None


def write_status(folder: Path, status: RunStatus) -> None:
    """Replace the file at once, so that a reader never sees half of it."""
    draft = folder / f"{NAME}.tmp"
    draft.write_text(json.dumps(asdict(status)))
    draft.replace(folder / NAME)


def read_status(folder: Path) -> RunStatus | None:
    """The newest status, None where there is none."""
    try:
        values = json.loads((folder / NAME).read_text())
    except FileNotFoundError:
        return None
    return TypeAdapter(RunStatus).validate_python(values)


@asynccontextmanager
async def kept_status(
    folder: Path, *, phase: Callable[[], str], roles: Callable[[], Sequence[RoleStatus]]
) -> AsyncIterator[None]:
    """Write the status every other second while the block runs, and ``ended`` after it.

    Args:
        phase: what the run as a whole does.
        roles: what each role does.
    """

    def now(text: str) -> RunStatus:
        return RunStatus(time=time.time(), phase=text, roles=tuple(roles()))

    async def keep() -> None:
        while True:
            write_status(folder, now(phase()))
            await asyncio.sleep(SECONDS)

    task = asyncio.create_task(keep(), name="status file")
    try:
        yield
    finally:
        task.cancel()
        write_status(folder, now("ended"))
