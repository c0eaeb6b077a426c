"""Requests for more or fewer generators: left in the run folder, taken once, refused where they are nonsense."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pilaf_ray.cli import app
from pilaf_ray.errors import ClusterError, ConfigError, RunFolderError
from pilaf_ray.pipeline.scaling import NAME, ask_for_generators, scaled_on_request, take_request
from pilaf_ray.run_folder import is_owned, open_run_folder


def scale(*arguments: object) -> None:
    """The command; raises what it raises."""
    done = CliRunner().invoke(app, ["scale", *map(str, arguments)])
    if done.exception is not None:
        raise done.exception


def test_a_request_is_taken_once_and_a_newer_one_replaces_it(tmp_path: Path) -> None:
    assert take_request(tmp_path) is None
    ask_for_generators(tmp_path, 2)
    ask_for_generators(tmp_path, 4)
    assert (take_request(tmp_path), take_request(tmp_path)) == (4, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("generators=0", "a pool with 0 generators samples nothing: give 1 or more"),
        ("generators=-1", "write generators=4, say"),
        ("learners=2", "other roles keep their number"),
        ("4", "write generators=4, say"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, wanted: str, message: str) -> None:
    with open_run_folder(tmp_path / "run", config_json="{}", resume=False):
        with pytest.raises(ConfigError, match=message) as caught:
            scale(tmp_path / "run", wanted)
        assert "\n" not in str(caught.value)
        assert take_request(tmp_path / "run") is None


def test_only_a_run_that_is_under_way_is_asked_and_a_new_attempt_starts_without_old_requests(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunFolderError, match="is no run that is under way"):
        scale(run, "generators=2")
    with open_run_folder(run, config_json="{}", resume=False):
        assert is_owned(run)
        scale(run, "generators=2")
    assert not is_owned(run)
    with pytest.raises(RunFolderError, match="is no run that is under way"):
        scale(run, "generators=3")
    with open_run_folder(run, config_json="{}", resume=True):
        assert take_request(run) is None


async def test_a_run_follows_requests_and_says_what_became_of_them(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    looked = asyncio.Event()

    async def resize(count: int) -> int:
        return min(count, 3)

    async def sleep(_seconds: float) -> None:
        looked.set()
        await asyncio.sleep(0)

    async def look() -> None:
        looked.clear()
        await looked.wait()

    report = lambda event, **details: events.append((event, details))  # noqa: E731
    async with asyncio.timeout(10), scaled_on_request(tmp_path, resize, report=report, sleep=sleep):
        await look()
        assert events == []
        for count in (2, 5):
            ask_for_generators(tmp_path, count)
            await look()
            await look()
    assert events == [
        ("scaling", {"generators": 2}),
        ("scaled", {"asked": 2, "generators": 2}),
        ("scaling", {"generators": 5}),
        ("scaled", {"asked": 5, "generators": 3}),
    ]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b'{"generators": 4', "Invalid JSON: EOF while parsing an object"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[4]", "Input should be an object"),
        (b'{"generators": "four"}', "generators: Input should be a valid integer"),
        (b'{"generators": 0}', "generators: Input should be greater than or equal to 1"),
        (b'{"replicas": 4}', "generators: Field required"),
        (b'{"generators": 4, "learners": 2}', "learners: Extra inputs are not permitted"),
    ],
)
def test_a_malformed_request_is_one_line_and_taken_away(tmp_path: Path, text: bytes, problem: str) -> None:
    (tmp_path / NAME).write_bytes(text)
    with pytest.raises(ConfigError, match=rf"scale\.json: {problem}.*; write it with pilaf-ray scale") as caught:
        take_request(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_cannot_be_taken_away_is_one_line(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.taken" / "in the way").mkdir(parents=True)
    ask_for_generators(tmp_path, 2)
    with pytest.raises(RunFolderError, match=r"scale\.json cannot be taken up: .*Is a directory"):
        take_request(tmp_path)


async def test_a_request_that_fails_is_reported_and_the_next_one_is_taken_up(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    reported = asyncio.Event()

    async def resize(count: int) -> int:
        if count == 9:
            raise ClusterError("Ray does not answer")
        return count

    async def sleep(_seconds: float) -> None:
        await asyncio.sleep(0)

    def report(event: str, **details: Any) -> None:
        events.append((event, details))
        reported.set()

    async def next_of(name: str) -> dict[str, Any]:
        while name not in (seen := dict(events)):
            reported.clear()
            await reported.wait()
        events.clear()
        return seen[name]

    async with asyncio.timeout(10), scaled_on_request(tmp_path, resize, report=report, sleep=sleep):
        (tmp_path / NAME).write_text("{")
        assert "Invalid JSON" in (await next_of("not scaled"))["cause"]
        ask_for_generators(tmp_path, 9)
        assert await next_of("not scaled") == {"cause": "Ray does not answer"}
        ask_for_generators(tmp_path, 3)
        assert await next_of("scaled") == {"asked": 3, "generators": 3}


async def test_a_bug_in_scaling_ends_the_run_at_once(tmp_path: Path) -> None:
    async def resize(_count: int) -> int:
        raise KeyError("a bug")

    ask_for_generators(tmp_path, 3)
    with pytest.raises(KeyError, match="a bug"):
        async with asyncio.timeout(10), scaled_on_request(tmp_path, resize, report=lambda *_, **__: None):
            await asyncio.Event().wait()
