"""What each role is doing, and how much of the time it was busy."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pilaf_ray.observability.busy import BusyMeter
from pilaf_ray.observability.run_status import ReplicaStatus, RoleStatus


class Metered(Protocol):
    """A role that counts its own busy time and knows its replicas."""

    meter: BusyMeter

    @property
    def replicas(self) -> Sequence[ReplicaStatus]: ...


class RoleActivity:
    """Busy seconds and calls under way by role, from :meth:`begin` on.

    Args:
        roles: the roles by name, as they are now; none before they have started.
        others: those whose state is told and whose time does not count.
    """

    def __init__(
        self,
        roles: Callable[[], Mapping[str, Metered]],
        *,
        others: Callable[[], Mapping[str, Metered]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roles = roles
        self._others = others
        self._clock = clock
        self._since = clock()
        self._before: dict[str, float] = {}

    def begin(self) -> None:
        """Count from now on."""
        self._since = self._clock()
        self._before = self.busy()

    @property
    def seconds(self) -> float:
        """Since :meth:`begin`."""
        return self._clock() - self._since

    def busy(self) -> dict[str, float]:
        """Seconds with at least one call under way, since each role started."""
        return {name: role.meter.busy_seconds for name, role in self._roles().items()}

    def utilization(self) -> dict[str, float]:
        """Busy share of the time since :meth:`begin`, from 0 to 1."""
        elapsed = max(1e-9, self.seconds)
        return {name: min(1.0, (busy - self._before.get(name, 0.0)) / elapsed) for name, busy in self.busy().items()}

    def lines(self) -> dict[str, tuple[int, float]]:
        """(calls under way, busy share) by role."""
        shares = self.utilization()
        return {name: (role.meter.in_flight, shares[name]) for name, role in self._roles().items()}

    def states(self) -> list[RoleStatus]:
        """What each role and its replicas do."""
        shares = self.utilization()
        return [
            RoleStatus(role=name, in_flight=role.meter.in_flight, busy=shares.get(name), replicas=tuple(role.replicas))
            for name, role in {**self._roles(), **self._others()}.items()
        ]
