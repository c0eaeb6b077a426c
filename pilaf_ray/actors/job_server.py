"""Calls to a Ray job server, and what it means when something else answers, or nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import BadStatusLine, RemoteDisconnected
from json import JSONDecodeError
from typing import Any

import aiohttp
import requests
from pydantic import ValidationError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state.exception import RayStateApiException

from pilaf_ray.errors import ClusterError

PORT = 8265
"""Of Ray's dashboard, unless it was started with another."""
REACH_SECONDS = 20.0
"""Deadline of a connection, and of the first answer."""
ANSWER_SECONDS = 120.0
"""Deadline of any other answer: a head under load takes its time."""
LONGEST = 500
"""Characters of a server's complaint that are shown."""

_FAILURES = (aiohttp.ClientError, RayStateApiException, OSError, RuntimeError, ValueError, KeyError, TypeError)
"""What Ray's client raises, besides AuthenticationError. An OSError may be one of ``requests``; the last three come of
answers that are JSON and not what Ray writes."""


def dashboard_url(named: str | None) -> str:
    """The job server that is meant: ``named``, else what the environment names, else this machine's.

    ``RAY_ADDRESS`` may name a head, which says nothing of its dashboard's port: that is the usual one then.
    """
    cluster = os.environ.get("RAY_ADDRESS", "")
    named = named or os.environ.get("RAY_API_SERVER_ADDRESS") or (cluster if cluster.startswith("http") else None)
    if named is None:
        host = cluster.removeprefix("ray://").rpartition(":")[0]
        named = f"{host or '127.0.0.1'}:{PORT}"
    return named if "://" in named else f"http://{named}"


class JobServerClient(JobSubmissionClient):
    """Ray's client, which by itself waits for ever for an answer."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> requests.Response:
        seconds = REACH_SECONDS if endpoint == "/api/version" else ANSWER_SECONDS
        return super()._do_request(method, endpoint, **{"timeout": (REACH_SECONDS, seconds), **more})


@contextmanager
def asking_job_server(address: str) -> Iterator[None]:
    """One call of Ray's client.

    Raises:
        ClusterError: nothing answers at ``address``, something that is no job server, or one that refuses.
    """
    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(_refused(address, _one_line(error.message))) from error
    except _FAILURES as error:
        raise ClusterError(_meaning(address, error)) from error


def _meaning(address: str, error: Exception) -> str:
    """What a failure of Ray's client says of what is at ``address``."""
    text, causes = _one_line(error), list(_causes(error))
    if isinstance(error, aiohttp.WSServerHandshakeError) and error.status in (401, 403):
        return _refused(address, text)
    if isinstance(error, requests.exceptions.InvalidURL):
        return f"{address} is no address of a dashboard: give it as http://HOST:{PORT}"
    if isinstance(error, requests.Timeout | TimeoutError):
        return _unreachable(address, "it did not answer in time")
    if any(isinstance(cause, BadStatusLine) and not isinstance(cause, RemoteDisconnected) for cause in causes):
        return _foreign(address, "it does not speak HTTP")
    if isinstance(error, ConnectionError | requests.ConnectionError | aiohttp.ClientConnectionError):
        reasons = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
        return _unreachable(address, reasons[-1] if reasons else text)
    page = "<html" in text.lower() or "<!doctype" in text.lower()
    if page or "Version check returned 404" in text:
        return _foreign(address, text.partition("<")[0].strip(" :") or "its answer is a page")
    if isinstance(error, JSONDecodeError | ValidationError | KeyError | TypeError | requests.HTTPError):
        return _foreign(address, text)
    # Of the server itself, or of what the client found wrong with the job.
    return f"{address}: {text}"


def _refused(address: str, reason: str) -> str:
    return (
        f"{address} refuses these credentials ({reason}): set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH to the cluster's token"
    )


def _unreachable(address: str, reason: str) -> str:
    return (
        f"no Ray job server answers at {address} ({reason}): start the head with "
        "`ray start --head --include-dashboard=true`, or name its dashboard with --address"
    )


def _foreign(address: str, reason: str) -> str:
    return (
        f"what answers at {address} is no Ray job server ({reason}): name the head's dashboard with --address; "
        f"its port is {PORT} unless `ray start` was told another"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it came from, also where a library keeps that as an argument."""
    yield error
    below = [error.__cause__ or error.__context__, *error.args, getattr(error, "reason", None)]
    for cause in below:
        if isinstance(cause, BaseException):
            yield from _causes(cause)
            return


def _one_line(error: object) -> str:
    """Words of an error; of a traceback that a server sends, its last line."""
    text = str(error).strip()
    head, found, trace = text.partition("Traceback (most recent call last)")
    if found:
        # Ray's client puts a full stop behind what the server sends.
        text = head + trace.rstrip(". \n").splitlines()[-1]
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[:LONGEST] + " …"
