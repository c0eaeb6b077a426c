"""What every request and answer passes: host names, sizes, rates, headers."""

import math
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 64 * 1024
HEADERS = {
    # Scripts and styles come from our own files only, so markup in a response can never act.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    # With no-referrer browsers would hide the origin of our own forms, too.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class RateLimit:
    """A bucket of tokens a client: ``burst`` at once, ``per_second`` in the long run."""

    def __init__(
        self, *, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic, clients: int = 10_000
    ) -> None:
        self._rate, self._burst, self._clock, self._clients = per_second, burst, clock, clients
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait_seconds(self, client: str) -> float:
        """0 and one token less, or how long until there is one."""
        now = self._clock()
        level, since = self._buckets.get(client, (float(self._burst), now))
        level = min(float(self._burst), level + (now - since) * self._rate)
        if level < 1:
            return (1 - level) / self._rate
        if client not in self._buckets and len(self._buckets) >= self._clients:
            # The oldest entry is the first: dicts keep the order of insertion.
            self._buckets.pop(next(iter(self._buckets)))
        self._buckets[client] = (level - 1, now)
        return 0.0


class Guard:
    """ASGI middleware around the whole app.

    Args:
        hosts: host names that requests may ask for; a page elsewhere that resolves its own name to this
            machine is refused. ``*`` allows any.
        limit: requests a client address may make.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], limit: RateLimit) -> None:
        self._app, self._hosts, self._limit = app, set(hosts), limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        guarded = _with_headers(send, cacheable=scope["path"].startswith("/static/"))
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        await self._app(scope, _bounded(receive), guarded)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.split(":")[0]
        if "*" not in self._hosts and name not in self._hosts:
            return PlainTextResponse(f"this console does not answer for the host '{name[:60]}'", 400)
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin not in (None, f"{scope['scheme']}://{host}"):
            return PlainTextResponse("forms of another site are not taken", 403)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return PlainTextResponse("the request is too large", 413)
        client = scope.get("client")
        wait = self._limit.wait_seconds(client[0] if client else "")
        if wait > 0:
            after = {"Retry-After": str(math.ceil(wait))}
            return PlainTextResponse("too many requests; the page will try again", 429, headers=after)
        return None


def _with_headers(send: Send, *, cacheable: bool) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers["Cache-Control"] = "public, max-age=3600" if cacheable else "no-store"
        await send(message)

    return guarded


def _bounded(receive: Receive) -> Receive:
    """Cuts a body that is longer than its Content-Length claimed, or that claimed none."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            return {"type": "http.disconnect"}
        return message

    return bounded
