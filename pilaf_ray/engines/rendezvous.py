"""Where the ranks of a process group meet."""

import os
import socket

import psutil

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def own_address() -> str:
    """What this node's own name resolves to; loopback where ``/etc/hosts`` says so, as Debian's does."""
    return socket.gethostbyname(socket.gethostname())


def free_address(host: str | None = None) -> tuple[str, int]:
    """This node's address as peers reach it, and a port that was free a moment ago.

    The port can be taken before it is used; callers retry with a new one, which
    every new group needs anyway.

    Args:
        host: the address, where somebody knows better than the node's own name.
    """
    host = host or own_address()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return host, int(probe.getsockname()[1])


def listen_at(address: str) -> None:
    """Let gloo in this process, and in those that it starts, listen where peers reach ``address``.

    By itself gloo takes what the node's name resolves to. A choice in the environment stays.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault(GLOO_INTERFACE, name)
