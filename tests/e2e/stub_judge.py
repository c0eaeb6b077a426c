"""An OpenAI-compatible endpoint in this process that judges by a rule that tests know."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEMPLATE = "{prompt}@@{first}@@{second}"


def preference(prompt: str, first: str, second: str) -> float:
    """P(first is better) of one question: always the first where the prompt's length is even, else the longer one."""
    if len(prompt) % 2 == 0:
        return 1.0
    return 0.5 * (1 + (len(first) > len(second)) - (len(first) < len(second)))


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = {1.0: "A", 0.5: "T", 0.0: "B"}[preference(*body["messages"][0]["content"].split("@@"))]
        reply = {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
        }  # fmt: skip
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is no server log."""


@contextmanager
def stub_judge() -> Iterator[str]:
    """The base of the endpoint, ended when the block is left."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
