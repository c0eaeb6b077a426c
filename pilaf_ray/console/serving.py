"""The server behind the console."""

import uvicorn
from fastapi import FastAPI


def server(app: FastAPI, *, host: str, port: int) -> uvicorn.Server:
    """A server that is not started. Requests are not logged: addresses and names stay out of logs."""
    return uvicorn.Server(
        uvicorn.Config(
            app, host=host, port=port, access_log=False, log_level="warning", server_header=False,
            # Live pages hold their connection open for as long as they are shown.
            timeout_graceful_shutdown=2, limit_concurrency=500, h11_max_incomplete_event_size=32 * 1024,
        )
    )  # fmt: skip


def serve(app: FastAPI, *, host: str, port: int) -> None:
    """Serve until Ctrl-C."""
    server(app, host=host, port=port).run()
