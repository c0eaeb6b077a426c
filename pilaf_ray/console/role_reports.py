"""What is known of each role's replicas: from the run's status, its events and its logs."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilaf_ray.console.records import RunRecords

LOG_LINES = 12
LOG_BYTES = 8192
_SECRETS = re.compile(r"(?i)(token|key|secret|password|authorization)(\W{1,3})\S{8,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleReport:
    """One replica of a role."""

    replica: str
    calls: int | None
    """Calls under way at the whole role; None where the run does not say."""
    busy: float | None
    deaths: int
    last_sign: float
    """Wall-clock time of the newest line of its log."""
    log: Sequence[str]
    memory_mib: float | None


def role_reports(records: RunRecords) -> list[RoleReport]:
    """One report for each log of the newest attempt, and how often each replica has died."""
    status = records.status()
    states = {role.role: role for role in status.roles} if status else {}
    reports = []
    for file in sorted((records.path / "logs" / "latest").glob("*.log")):
        replica = file.stem
        role = states.get(replica.rsplit("-", 1)[0])
        reports.append(
            RoleReport(
                replica=replica,
                calls=role.in_flight if role else None,
                busy=role.busy if role else None,
                deaths=sum(_is_death(event, replica) for event in records.events),
                last_sign=file.stat().st_mtime,
                log=_tail(file),
                memory_mib=_newest_memory(records, replica),
            )
        )
    return reports


def _is_death(event: dict[str, Any], replica: str) -> bool:
    return replica in (event.get("role"), event.get("replica")) and "died" in str(event["event"])


def _newest_memory(records: RunRecords, replica: str) -> float | None:
    for event in reversed(records.events):
        if event["event"] == "usage":
            value = event["memory_mib"].get(replica)
            return None if value is None else float(value)
    return None


def _tail(file: Path) -> list[str]:
    """The last lines of a log; what looks like a secret is struck out."""
    with file.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - LOG_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    return [_SECRETS.sub(r"\1\2•••", line)[:400] for line in lines]
