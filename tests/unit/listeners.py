"""What may stand where Ray is looked for: web servers, and things that do not speak its protocol."""

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""With which a gRPC server, as Ray's head is one, answers whoever speaks HTTP/2."""


@contextmanager
def web_server(answers: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """``host:port`` of a server with an answer (status, text) for each path; ``*`` stands for every other path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path.partition("?")[0], answers.get("*", (404, "404: Not Found")))
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if text.startswith(("{", "[")) else "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@contextmanager
def listener(greeting: bytes) -> Iterator[str]:
    """``host:port`` of something that says ``greeting`` to everyone and hangs up; without one it says nothing."""
    kept: list[socket.socket] = []

    def answer() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            kept.append(connection)
            # Whoever has heard enough may be gone already, which resets the connection; the next one still is served.
            with suppress(OSError):
                if greeting:
                    connection.sendall(greeting)
                    connection.shutdown(socket.SHUT_WR)

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in kept:
        connection.close()


def closed_port() -> str:
    """``host:port`` where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
