"""An HTTP endpoint that keeps what is posted to it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Inbox:
    """What was posted, and how the endpoint behaves."""

    def __init__(self) -> None:
        self.url = ""
        self.posts: list[dict[str, Any]] = []
        self.answers = threading.Event()
        """Cleared: posts are kept waiting."""
        self.answers.set()
        self.speaks_http = True


@contextmanager
def open_inbox() -> Iterator[Inbox]:
    """Serve an inbox while the block runs; afterwards nobody listens at its URL."""
    inbox = Inbox()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            inbox.answers.wait()
            inbox.posts.append(json.loads(body))
            if not inbox.speaks_http:
                self.wfile.write(b"what is this\r\n")
                return
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        inbox.url = f"http://127.0.0.1:{server.server_port}/"
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield inbox
        finally:
            inbox.answers.set()
            server.shutdown()
            serving.join()
