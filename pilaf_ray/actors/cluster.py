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
    if target == "auto":
        target = os.environ.get("RAY_ADDRESS") or "auto"
    named = target
    if target == "auto":
        target = _cluster_of_this_machine()
        named = f"{target}, which Ray noted for address auto"
    host, separator, port = target.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        _require_head(host.strip("[]"), int(port), named=named)
    try:
        ray.init(address=target, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {named}: {' '.join(str(error).split())}") from error


def _cluster_of_this_machine() -> str:
    # Ray itself waits for minutes where the cluster that it noted is no more, and has no public call for the note.
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found: str | None = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if found is None:
        raise ClusterError(
            "no Ray cluster was started on this machine, and resources.address, or RAY_ADDRESS, is auto: start one "
            "with `ray start --head`, name a cluster's host:port, or leave both out for a private one"
        )
    return found


def _require_head(host: str, port: int, *, named: str) -> None:
    """Raise ClusterError where nothing listens, or something that does not speak as a Ray head does."""
    mend = "start it with `ray start --head`, or mend resources.address, or RAY_ADDRESS, which stands for it"
    try:
        with socket.create_connection((host, port), timeout=_REACH_SECONDS) as connection:
            # With Ray's TLS only its own certificates open the conversation.
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0") or _speaks_http2(connection):
                return
    except OSError as error:
        raise ClusterError(f"no Ray head answers at {named} ({error.strerror or error}): {mend}") from error
    raise ClusterError(f"what listens at {named} is no Ray head: its port is 6379 unless it was told another; {mend}")


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether the other side answers as gRPC does, on which Ray's protocol is built: first of all with its settings.

    Raises:
        TimeoutError: it does not answer.
    """
    settings = 4
    frame = bytes([0, 0, 0, settings, 0, 0, 0, 0, 0])
    answer = b""
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame)
        while len(answer) < len(frame) and (more := connection.recv(len(frame) - len(answer))):
            answer += more
    except ConnectionError:
        return False
    return len(answer) == len(frame) and answer[3] == settings
