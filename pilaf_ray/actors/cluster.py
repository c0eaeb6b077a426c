"""Joining or starting a Ray cluster."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from pilaf_ray.errors import ClusterError

logger = logging.getLogger(__name__)

# A killed generator must not leave vLLM's engine processes (and their memory) behind.
_RAYLET_ENVIRONMENT = {"RAY_process_group_cleanup_enabled": "true"}
# Ray turns token authentication on for a new local cluster unless told; a single-user
# cluster on loopback has no use for it, and an existing cluster's own setting wins.
_LOCAL_DEFAULTS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's record of the newest calls, for its dashboard: 100,000 of them grow to 300 MiB over thousands of steps.
    "RAY_task_events_max_num_task_in_gcs": "5000",
}

_REACH_SECONDS = 20.0
"""Ray itself waits for minutes for a head that is not there, and prints pages meanwhile."""


@contextmanager
def ray_cluster(*, address: str | None, num_cpus: float) -> Iterator[None]:
    """Connect to ``address`` (or ``$RAY_ADDRESS``), else start a private local cluster.

    Args:
        address: cluster address, ``auto``, or None.
        num_cpus: logical CPUs that a private cluster offers; roles may share cores.

    Raises:
        ClusterError: nothing answers at the address, or another version of Ray or Python does.
    """
    target = address or os.environ.get("RAY_ADDRESS")
    os.environ.update(_RAYLET_ENVIRONMENT)
    if target is None:
        for name, value in _LOCAL_DEFAULTS.items():
            os.environ.setdefault(name, value)
        ray.init(
            # Without this Ray joins whatever cluster was last started on the machine.
            address="local",
            num_cpus=max(1, round(num_cpus)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    else:
        _join(target)
    try:
        yield
    finally:
        ray.shutdown()


def _join(target: str) -> None:
    host, separator, port = target.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
        except OSError as error:
            raise ClusterError(
                f"no Ray head answers at {target} ({error.strerror or error}): start it with `ray start --head`, or "
                "mend resources.address, or RAY_ADDRESS, which stands for it"
            ) from error
    try:
        ray.init(address=target, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {target}: {' '.join(str(error).split())}") from error
