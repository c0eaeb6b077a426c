"""What is known of each role's replicas: from the run's status, its events and its logs."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilaf_ray.console.records import RunRecords

LOGS = {"preference store": "store"}
"""Names of roles in events whose logs have another."""
LOG_LINES = 12
LOG_BYTES = 8192
_SECRETS = re.compile(r"(?i)(token|key|secret|password|authorization)(\W{1,3})\S{8,}")


@dataclass(frozen=True, slots=True)
class Loss:
    """When a replica was lost, and why."""

    time: float
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleReport:
    """One replica of a role."""

    replica: str
    serving: bool | None
    """False while it is being replaced; None where the run does not say."""
    calls: int | None
    """Calls under way at the whole role; None where the run does not say."""
    busy: float | None
    losses: Sequence[Loss]
    heartbeat: float | None
    """Wall-clock time of the newest one."""
    memory_mib: float | None
    last_line: float
    """Wall-clock time of the newest line of its log."""
    log: Sequence[str]


def role_reports(records: RunRecords) -> list[RoleReport]:
    """One report for each log of the newest attempt, and when each replica was lost."""
    status = records.status()
    states = {role.role: role for role in status.roles} if status else {}
    reports = []
    for file in sorted((records.path / "logs" / "latest").glob("*.log")):
        replica = file.stem
        name, _, number = replica.partition("-")
        role = states.get(name)
        own = next((r for r in role.replicas if r.number == int(number or 0)), None) if role else None
        reports.append(
            RoleReport(
                replica=replica,
                serving=own.serving if own else None,
                calls=role.in_flight if role else None,
                busy=role.busy if role else None,
                losses=[
                    Loss(event["time"], event.get("cause", ""))
                    for event in records.events
                    if _lost(event) in ((name, int(number or 0)), (name, None))
                ],
                heartbeat=own.pulse.time if own and own.pulse else None,
                memory_mib=own.pulse.memory_mib if own and own.pulse else None,
                last_line=file.stat().st_mtime,
                log=_tail(file),
            )
        )
    return reports


def _lost(event: dict[str, Any]) -> tuple[str, int | None] | None:
    """Whose loss an event tells of: the name of its log, and its number; None for all of that name."""
    match event["event"]:
        case "replica lost":
            return LOGS.get(event["role"], event["role"]), event["replica"]
        case "learner lost":
            return "learner", None
        case "console restarted":
            return "console", None
        case "controller lost":
            return "controller", None
    return None


def _tail(file: Path) -> list[str]:
    """The last lines of a log; what looks like a secret is struck out."""
    with file.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - LOG_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    return [_SECRETS.sub(r"\1\2•••", line)[:400] for line in lines]
