"""All TCP connections of a process are destroyed at once, on both sides: the kernel does it for ``ss -K``.

Processes that talk through Unix sockets and shared memory keep those; who has lost a connection may open it again.
Needs root, and a kernel that destroys sockets for others (CONFIG_INET_DIAG_DESTROY).
"""

import shutil
import socket
import subprocess
from functools import cache

import psutil


def cut(pid: int) -> int:
    """Destroy the connections of ``pid``; returns how many there were. Raises ProcessLookupError where it is gone."""
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(pid) from error
    open_now = [c for c in connections if c.status == psutil.CONN_ESTABLISHED]
    for connection in open_now:
        _destroy(connection.laddr, connection.raddr)
    return len(open_now)


@cache
def available() -> bool:
    """Whether it works here: tried on a connection of our own."""
    if shutil.which("ss") is None:
        return False
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            _destroy(client.getsockname(), client.getpeername())
            try:
                client.sendall(b"x")
            except OSError:
                return True
    return False


def _destroy(source: tuple[str, int], target: tuple[str, int]) -> None:
    ends = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in (source, target)]
    subprocess.run(["ss", "-K", "-t", "src", ends[0], "dst", ends[1]], capture_output=True, check=False)
