"""What people should know who do not watch: never a reason for a run to stop or to wait."""

import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from http.client import HTTPException

logger = logging.getLogger(__name__)

WEBHOOK_SECONDS = 10.0
QUIET_SECONDS = 600.0
"""An event that comes again is told again after so long: an outage is met by every pair, at every attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """One thing to know.

    Example: ``Alert(event="given up", message="oracle 0 failed 5 times in a row; first: out of memory")``
    """

    event: str
    message: str
    guard: str | None = None
    """With the next two, where a guard's limit was passed."""
    policy: str | None = None
    step: int | None = None


def alert_of(event: str, details: Mapping[str, object]) -> Alert | None:
    """What is said of a line of ``events.jsonl``; None where nobody has to know at once."""
    cause = details.get("cause", "")
    match event:
        case "given up":
            return Alert(event=event, message=str(cause))
        case "oracle outage":
            return Alert(event=event, message=f"the oracle is out of reach: {cause}")
        case "controller lost":
            return Alert(event=event, message=f"the controller was lost after step {details.get('step')}: {cause}")
        case "controller restarted":
            return Alert(
                event=event, message=f"the controller is there again (attempt {details.get('attempt')}): {cause}"
            )
    return None


class EventAlerts:
    """Tells of events that nobody should miss, each kind once in a while.

    Args:
        tell: is given what is to be known.
    """

    def __init__(self, tell: Callable[[Alert], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._told: dict[str, float] = {}

    def __call__(self, event: str, details: Mapping[str, object]) -> None:
        """Look at one line of ``events.jsonl``."""
        alert = alert_of(event, details)
        now = self._clock()
        if alert is None or now - self._told.get(event, -QUIET_SECONDS) < QUIET_SECONDS:
            return
        self._told[event] = now
        self._tell(alert)


class Webhook:
    """Posts each alert as a JSON object to one URL, in the background; close it to wait for what is under way.

    Args:
        url: http or https; None where nobody is told.
    """

    def __init__(self, url: str | None, *, run: str) -> None:
        self._url = url
        self._run = run
        self._posts: list[threading.Thread] = []

    def send(self, alert: Alert) -> None:
        """Post ``alert``, where there is a URL."""
        if self._url is None:
            return
        known = {key: value for key, value in asdict(alert).items() if value is not None}
        body = json.dumps({"run": self._run, **known}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        # A daemon, so that an endpoint that never answers does not keep the process.
        thread = threading.Thread(target=self._post, args=(request,), name="webhook", daemon=True)
        self._posts = [*(post for post in self._posts if post.is_alive()), thread]
        thread.start()

    def close(self, seconds: float = WEBHOOK_SECONDS) -> None:
        """Wait for posts under way, ``seconds`` for all of them at most: the last one may say why the run ended."""
        deadline = time.monotonic() + seconds
        for post in self._posts:
            post.join(max(0.0, deadline - time.monotonic()))
        if any(post.is_alive() for post in self._posts):
            logger.warning("guards.webhook did not answer within %.0f s: an alert may be lost", seconds)

    def _post(self, request: urllib.request.Request) -> None:
        try:
            urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS).close()
        except (OSError, HTTPException) as error:
            logger.warning("the alert did not reach guards.webhook: %s", error)
