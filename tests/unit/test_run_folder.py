"""One owner at a time, attempts, and the records of a run."""

import json
import logging
from pathlib import Path

import pytest

from pilaf_ray.errors import RunFolderError
from pilaf_ray.observability.logs import close_logging, setup_logging
from pilaf_ray.observability.sinks import JsonlSink
from pilaf_ray.run_folder import open_run_folder


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with (
        open_run_folder(path, config_json="{}", resume=False),
        pytest.raises(RunFolderError, match="is in use by a running job"),
        open_run_folder(path, config_json="{}", resume=False),
    ):
        pass
    with (
        pytest.raises(RunFolderError, match="holds a run already: add --resume"),
        open_run_folder(path, config_json="{}", resume=False),
    ):
        pass


def test_attempts_count_up_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for number, resume in ((1, False), (2, True)):
        with open_run_folder(path, config_json="{}", resume=resume) as folder:
            assert folder.attempt == number
    (path / "logs" / "attempt_1").rmdir()
    with open_run_folder(path, config_json="{}", resume=True) as folder:
        assert folder.attempt == 3
        assert (path / "logs" / "latest").resolve() == folder.logs.resolve()


def test_logs_of_the_first_and_of_the_newest_attempts_stay(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for number in range(1, 26):
        with open_run_folder(path, config_json="{}", resume=number > 1) as folder:
            assert folder.attempt == number
    kept = sorted(int(found.name.removeprefix("attempt_")) for found in (path / "logs").glob("attempt_*"))
    assert kept == [1, *range(6, 26)]


def test_a_log_is_bounded_in_size_and_keeps_the_newest_lines(tmp_path: Path) -> None:
    setup_logging("generator-0", tmp_path, log_bytes=4096)
    try:
        for number in range(200):
            logging.getLogger("pilaf_ray.test").info("line %d of a long run", number)
    finally:
        close_logging()
    newest, before = tmp_path / "generator-0.log", tmp_path / "generator-0.log.1"
    assert sorted(tmp_path.iterdir()) == [newest, before]
    assert max(newest.stat().st_size, before.stat().st_size) <= 4096
    assert newest.read_text().rstrip().endswith("line 199 of a long run")


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with (
        pytest.raises(RunFolderError, match="holds no run to resume"),
        open_run_folder(tmp_path / "none", config_json="{}", resume=True),
    ):
        pass


def test_records_of_later_steps_are_cut_with_a_torn_last_line(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    for step in range(1, 5):
        sink.write({"step": step})
    with (tmp_path / "m.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    sink.cut_after(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [1, 2]


def test_a_record_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"cannot write .*--resume"):
        JsonlSink(tmp_path / "missing" / "m.jsonl").write({"step": 1})
