"""Where the console listens."""

import socket

from pilaf_ray.errors import ConfigError


def require_free_port(host: str, port: int) -> None:
    """Raise ConfigError where nothing could be served at ``host:port`` of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"console.host, console.port: {host}:{port} cannot be bound ({error.strerror}); choose another port"
            ) from error
