"""Settings of the console that a run serves."""

from pydantic import Field

from pilaf_ray.config.base import Section


class ConsoleSection(Section):
    """The web page about the run, served by the run itself; `pilaf-ray console RUN` shows any run without it."""

    serve: bool | None = None
    """Whether the run serves it; by default where its oracle asks people."""
    host: str = "127.0.0.1"
    """Address to bind to; off loopback, everyone needs a token."""
    port: int = Field(default=8321, ge=1, le=65535)
    """Port."""
    allowed_hosts: tuple[str, ...] = ()
    """Further host names under which browsers reach it."""
