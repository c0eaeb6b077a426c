"""Alarms of the guards, to people: never a reason for a run to stop or to wait."""

import json
import logging
import threading
import urllib.request
from dataclasses import asdict

from pilaf_ray.pipeline.guards import Alarm

logger = logging.getLogger(__name__)

WEBHOOK_SECONDS = 10.0


class Webhook:
    """Posts each alarm as a JSON object to one URL, in the background."""

    def __init__(self, url: str | None, *, run: str) -> None:
        self._url = url
        self._run = run

    def send(self, alarm: Alarm) -> threading.Thread | None:
        """Post ``alarm``; returns the thread that does, or None where there is no URL."""
        if self._url is None:
            return None
        body = json.dumps({"run": self._run, **asdict(alarm)}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        thread = threading.Thread(target=self._post, args=(request,), name="webhook", daemon=True)
        thread.start()
        return thread

    def _post(self, request: urllib.request.Request) -> None:
        try:
            urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS).close()
        except OSError as error:
            logger.warning("the alarm did not reach guards.webhook: %s", error)
