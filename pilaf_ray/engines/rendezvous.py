"""Where the ranks of a process group meet."""

import socket


def free_address() -> tuple[str, int]:
    """This node's address as peers reach it, and a port that was free a moment ago.

    The port can be taken before it is used; callers retry with a new one, which
    every new group needs anyway.
    """
    host = socket.gethostbyname(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return host, int(probe.getsockname()[1])
