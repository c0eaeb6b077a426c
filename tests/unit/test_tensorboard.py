"""What TensorBoard reads of what a run wrote."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from event_files import scalars
from tensorboard.summary.writer.record_writer import RecordWriter

from pilaf_ray import build
from pilaf_ray.config.loader import load_config
from pilaf_ray.errors import ConfigError
from pilaf_ray.observability.tensorboard_sink import TensorBoardSink

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def test_numbers_are_read_back_by_step_before_the_file_is_closed(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tensorboard")
    sink.cut_after(0)
    sink.write({"step": 1, "loss": 0.6931471805599453, "age/max": 3, "reward/policy": None, "note": "text"})
    sink.write({"step": 2, "loss": 0.5, "z/plus": 1e-9})
    found = scalars(tmp_path / "tensorboard")
    assert set(found) == {"loss", "age/max", "z/plus"}
    assert found["loss"] == [(1, pytest.approx(0.6931471805599453, rel=1e-7)), (2, 0.5)]
    assert found["age/max"] == [(1, 3.0)] and found["z/plus"] == [(2, pytest.approx(1e-9, rel=1e-7))]


def test_a_resumed_run_takes_back_what_is_done_again(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    first.cut_after(0)
    for step in range(1, 6):
        first.write({"step": step, "loss": float(step)})
    # Killed here; the newest checkpoint is that of step 2, and what comes now dies a second time at step 3.
    second = TensorBoardSink(tmp_path)
    second.cut_after(2)
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 2.0)]
    second.write({"step": 3, "loss": 30.0})
    second.write({"step": 4, "loss": 40.0})
    second.cut_after(3)
    second.write({"step": 4, "loss": 44.0})
    second.close()
    second.close()
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 44.0)]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_fails_ends_the_file_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        nowhere = TensorBoardSink(tmp_path / "file")
        nowhere.write({"step": 1, "loss": 1.0})
        nowhere.cut_after(1)
        sink = TensorBoardSink(tmp_path / "folder")
        sink.write({"step": 1, "loss": 1.0})

        def full(_self: object, _data: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(RecordWriter, "write", full)
        for step in (2, 3):
            sink.write({"step": step, "loss": 1.0})
        sink.close()
    assert not nowhere.active and not sink.active
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and all("(metrics.jsonl goes on)" in message for message in messages)
    assert "No space left on device" in messages[1]
    assert scalars(tmp_path / "folder") == {"loss": [(1, 1.0)]}


def test_a_missing_package_is_one_line_and_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    build.check_logging(load_config(TINY))
    with pytest.raises(ConfigError, match=r"^logging\.tensorboard: the package tensorboard is not installed.*$"):
        build.check_logging(load_config(TINY, ["logging.tensorboard=true"]))


def test_neither_torch_nor_tensorflow_is_loaded_for_it(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from pilaf_ray.observability.tensorboard_sink import TensorBoardSink
TensorBoardSink(Path({str(tmp_path)!r})).write({{"step": 1, "loss": 1.0}})
assert not {{"torch", "tensorflow"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
