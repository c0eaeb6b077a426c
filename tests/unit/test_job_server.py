"""What is said where Ray's job server is looked for and does not answer as one."""

import json
import re
import sys
from pathlib import Path

import pytest
from listeners import closed_port, listener, web_server
from submission_example import example

from pilaf_ray import cli
from pilaf_ray.actors import job_server
from pilaf_ray.actors.job_server import dashboard_url
from pilaf_ray.actors.jobs import RayJobs
from pilaf_ray.errors import ClusterError

VERSION = {"/api/version": (200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}))}


@pytest.fixture(autouse=True)
def no_cluster_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what is set by the tested code is taken back, too.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")


def complaint(address: str, ask: str = "jobs") -> str:
    """The one line that a question to ``address`` ends with."""
    with pytest.raises(ClusterError) as refusal:
        jobs = RayJobs(address)
        match ask:
            case "jobs":
                jobs.jobs()
            case "submit":
                jobs.submit(example(target="ray"))
            case "stop":
                jobs.stop("a")
            case _:
                jobs.logs("a", follow=ask == "follow", write=print)
    line = str(refusal.value)
    assert "\n" not in line
    return line.replace(address, "HERE")


def test_a_web_server_is_no_job_server() -> None:
    with web_server({"*": (200, "<html><body>Welcome</body></html>")}) as address:
        assert complaint(address).startswith("what answers at http://HERE is no Ray job server (Expecting value")
    with web_server({}) as address:
        assert "HERE is no Ray job server (Version check returned 404." in complaint(address)
    with web_server({"*": (502, "<html>Bad Gateway</html>")}) as address:
        assert "HERE is no Ray job server (502 Server Error: Bad Gateway" in complaint(address)
    with web_server({"*": (200, '{"status": "fine"}')}) as address:
        assert "HERE is no Ray job server ('ray_version')" in complaint(address)
    with web_server({**VERSION, "*": (200, '[{"name": "other"}]')}) as address:
        assert "HERE is no Ray job server (" in complaint(address)
    with web_server({**VERSION, "*": (503, "<html>busy</html>")}) as address:
        assert "HERE is no Ray job server (Request failed with status code 503)" in complaint(address)


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_are_refused_are_said_to_be(status: int) -> None:
    with web_server({"*": (status, "no entry")}) as address:
        line = complaint(address)
    assert re.match(r"http://HERE refuses these credentials \(Authentication \w+: no entry Token", line)
    assert line.endswith("set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token")


def test_what_does_not_speak_http_or_does_not_speak_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener(b"SSH-2.0-OpenSSH_9.6\r\n") as address:
        line = complaint(address)
    assert line.startswith("what answers at http://HERE is no Ray job server (it does not speak HTTP): name the head's")
    monkeypatch.setattr(job_server, "REACH_SECONDS", 0.2)
    with listener(b"") as address:
        assert complaint(address).startswith("no Ray job server answers at http://HERE (it did not answer in time)")
    assert complaint(closed_port()).startswith("no Ray job server answers at http://HERE (Connection refused): start")
    assert complaint("http://head:dashboard").startswith(
        "HERE is no address of a dashboard: give it as http://HOST:8265"
    )


def test_a_server_that_complains_is_shown_as_it_speaks() -> None:
    old = {"/api/version": (200, '{"ray_version": "1.8.0"}')}
    with web_server(old) as address:
        line = complaint(address)
    assert line.startswith("http://HERE: Ray version 1.8.0 is running on the cluster. Jobs API is not supported")
    traceback = 'Traceback (most recent call last):\n  File "job_head.py", line 1\nValueError: the disk is full\n'
    with web_server({**VERSION, "*": (500, traceback)}) as address:
        for ask in ("jobs", "stop", "logs", "follow"):
            line = complaint(address, ask)
            assert line == "http://HERE: Request failed with status code 500: ValueError: the disk is full"


def test_every_call_is_guarded() -> None:
    """The first that fails is the one after those that work: nodes, logs, the followed log, the stop."""
    page = (200, "<html></html>")
    with web_server({**VERSION, "*": page}) as address:
        assert "Failed to parse Response" in complaint(address, "submit")
    known = {
        "type": "SUBMISSION", "submission_id": "a", "status": "RUNNING", "entrypoint": "e", "metadata": {},
        "job_id": None, "driver_info": None,
    }  # fmt: skip
    listed = {**VERSION, "/api/jobs/": (200, json.dumps([known]))}
    with web_server({**listed, "*": page}) as address:
        for ask in ("logs", "stop"):
            assert "HERE is no Ray job server (Expecting value" in complaint(address, ask)
        assert "HERE" in complaint(address, "follow")
    with web_server({**listed, "*": (403, "no")}) as address:
        assert complaint(address, "follow").startswith("http://HERE refuses these credentials (")


def test_the_address_that_is_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own clients let the environment win."""
    assert dashboard_url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert dashboard_url(None) == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert dashboard_url(None) == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:80")
    assert dashboard_url(None) == "http://head:80"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:8265")
    assert dashboard_url(None) == "http://elsewhere:8265"
    assert dashboard_url("near:1") == "http://near:1"
    with web_server({**VERSION, "/api/jobs/": (200, "[]")}) as address:
        assert RayJobs(f"http://{address}").jobs() == []


def test_the_command_line_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with web_server({"*": (401, "no entry")}) as address:
        monkeypatch.setattr(sys, "argv", ["pilaf-ray", "jobs", "--address", f"http://{address}"])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: http://{address} refuses these credentials") and error.count("\n") == 1
