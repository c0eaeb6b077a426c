"""Requests for more or fewer generators: left in the run folder, taken once, refused where they are nonsense."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pilaf_ray.cli import app
from pilaf_ray.errors import ConfigError, RunFolderError
from pilaf_ray.pipeline.scaling import ask_for_generators, scaled_on_request, take_request
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
