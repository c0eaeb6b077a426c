"""Where the console listens."""

import socket

from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from pilaf_ray.errors import ConfigError


def require_free_port(
    host: str, port: int, *, settings: str = "console.host, console.port", patience_seconds: float = 0.0
) -> None:
    """Raise ConfigError where nothing could be served at ``host:port`` of this machine.

    Args:
        host: an address of this machine.
        port: the port.
        settings: what a message names as the place of both.
        patience_seconds: so long is waited for whoever has the port to leave it.
    """
    patiently = retry(
        retry=retry_if_exception_type(ConfigError),
        stop=stop_after_delay(patience_seconds),
        wait=wait_fixed(0.2),
        reraise=True,
    )
    patiently(_require_free_port)(host, port, settings)


def _require_free_port(host: str, port: int, settings: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{settings}: {host}:{port} cannot be bound ({error.strerror}); choose another port"
            ) from error
