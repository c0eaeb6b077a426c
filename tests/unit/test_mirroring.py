"""Copies of checkpoints: made beside the run, retried, kept by policy, and enough to go on elsewhere."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.engines.checkpoint import CheckpointStore
from pilaf_ray.engines.mirror_location import MirrorLocation
from pilaf_ray.engines.retention import RetentionPolicy
from pilaf_ray.errors import CheckpointError, ConfigError, MirrorError, RunFolderError
from pilaf_ray.pipeline.mirroring import ATTEMPTS, CheckpointMirror
from pilaf_ray.run_mirror import fetch_run, gather, is_resumable, require_new

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


class FailingFileSystem(MemoryFileSystem):
    """Memory that refuses so many writes, of any kind of error that a client library may raise."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refusals: ClassVar[list[Exception]] = []

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        if "w" in mode and self.refusals:
            raise self.refusals.pop()
        return super()._open(path, mode, **settings)


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    for kind in (MemoryFileSystem, FailingFileSystem):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    FailingFileSystem.refusals.clear()


def settings(tmp_path: Path, mirror: str, *more: str) -> RunConfig:
    return load_config(TINY, [f"run.folder={tmp_path}", "run.name=r", f"checkpoint.mirror={mirror}", *more])


async def write(folder: Path) -> None:
    (folder / "learner" / "hf").mkdir(parents=True)
    (folder / "learner" / "hf" / "weights").write_text(f"weights of {folder.name}")


def make_run(run: Path) -> sqlite3.Connection:
    """A run folder whose ledger is open, with what is written still in its log."""
    (run / "evaluations").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (run / "events.jsonl").write_text('{"event": "checkpoint"}\n')
    (run / "evaluations" / "step-000002.json").write_text('{"step": 2}')
    ledger = sqlite3.connect(run / "preferences.db")
    ledger.execute("PRAGMA journal_mode=WAL")
    ledger.execute("CREATE TABLE pairs (id INTEGER)")
    ledger.execute("INSERT INTO pairs VALUES (7)")
    ledger.commit()
    ledger.execute("INSERT INTO pairs VALUES (8)")
    return ledger


async def copy(run: Path, location: MirrorLocation, *steps: int, staging: Path) -> None:
    store = CheckpointStore(run / "checkpoints", keep_last=9)
    for step in steps:
        await store.write(step, write)
        location.upload(step, gather(run, step, staging / str(step), with_ledger=True))
        location.point(step)


@pytest.mark.parametrize("scheme", ["memory", "file"])
async def test_a_copy_is_enough_to_go_on_in_an_empty_folder(tmp_path: Path, scheme: str) -> None:
    url = "memory://bucket/runs" if scheme == "memory" else f"file://{tmp_path}/elsewhere"
    config = settings(tmp_path / "new", url)
    location = MirrorLocation(url, run="r")
    run, new = tmp_path / "old" / "r", tmp_path / "new" / "r"
    with closing(make_run(run)):
        assert not is_resumable(config, new) and fetch_run(config, new) is None
        await copy(run, location, 2, 4, staging=tmp_path / "staging")
    assert location.steps() == [2, 4]
    assert is_resumable(config, new)
    with pytest.raises(RunFolderError, match="holds a run already: add --resume"):
        require_new(config)
    assert fetch_run(config, new) == 4
    found = CheckpointStore(new / "checkpoints", keep_last=1).latest()
    assert found == (4, new / "checkpoints" / "step-000004")
    assert (found[1] / "learner" / "hf" / "weights").read_text().startswith("weights of tmp.4.")
    assert (new / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n', "a torn line is left out"
    assert json.loads((new / "evaluations" / "step-000002.json").read_text()) == {"step": 2}
    with closing(sqlite3.connect(new / "preferences.db")) as ledger:
        assert ledger.execute("SELECT id FROM pairs").fetchall() == [(7,)], "what was committed, and nothing else"
    assert {p.name for p in new.iterdir()} == {
        *("checkpoints", "config.json", "evaluations", "events.jsonl", "metrics.jsonl", "preferences.db")
    }
    (new / "metrics.jsonl").write_text("mine")
    assert fetch_run(config, new) is None and (new / "metrics.jsonl").read_text() == "mine", "what is here is used"


@pytest.mark.parametrize("damage", ["changed", "missing", "no sums"])
async def test_a_damaged_copy_falls_back_to_the_one_before_and_none_is_an_error(tmp_path: Path, damage: str) -> None:
    url = f"file://{tmp_path}/elsewhere"
    run, location = tmp_path / "old" / "r", MirrorLocation(url, run="r")
    with closing(make_run(run)):
        await copy(run, location, 2, 4, staging=tmp_path / "staging")
    for step, name in ((4, "newest"), (2, "both")):
        folder = tmp_path / "elsewhere" / "r" / f"step-{step:06d}"
        weights = folder / "checkpoint" / "learner" / "hf" / "weights"
        match damage:
            case "changed":
                weights.write_text("weights of tmp.5")
            case "missing":
                weights.unlink()
            case _:
                (folder / "mirror.json").unlink()
        config = settings(tmp_path / name, url)
        if step == 4:
            assert fetch_run(config, tmp_path / name / "r") == 2
            assert sorted(p.name for p in (tmp_path / name / "r" / "checkpoints").iterdir()) == ["step-000002"]
        elif damage == "no sums":
            assert fetch_run(config, tmp_path / name / "r") is None, "what was never whole is no copy"
        else:
            with pytest.raises(CheckpointError, match=r"no copy of a checkpoint is sound, of steps \[2, 4\]"):
                fetch_run(config, tmp_path / name / "r")
            assert not (tmp_path / name / "r" / "config.json").exists()


async def test_within_a_round_the_checkpoint_that_it_is_sampled_from_comes_too(tmp_path: Path) -> None:
    rounds = "schedule={type: iterative, rounds: 3, pairs_per_round: 16}"  # four steps a round
    config = settings(tmp_path / "new", "memory://bucket", rounds, "run.max_steps=12")
    run, location = tmp_path / "old" / "r", MirrorLocation("memory://bucket", run="r")
    with closing(make_run(run)):
        await copy(run, location, 2, 4, 6, staging=tmp_path / "staging")
    assert fetch_run(config, tmp_path / "new" / "r") == 6
    steps = sorted(p.name for p in (tmp_path / "new" / "r" / "checkpoints").iterdir())
    assert steps == ["step-000004", "step-000006"]
    location.remove(4)
    config = settings(tmp_path / "again", "memory://bucket", rounds, "run.max_steps=12")
    assert fetch_run(config, tmp_path / "again" / "r") == 2, "without it the newest copy is of no use"


def test_an_unknown_file_system_and_a_secret_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: nonsense://x cannot be opened \(Protocol not known"):
        require_new(settings(tmp_path, "nonsense://x"))
    with pytest.raises(ConfigError, match="'runs/copies' is no location: write s3://BUCKET/FOLDER"):
        settings(tmp_path, "runs/copies")
    with pytest.raises(ConfigError, match="keep secrets out of the URL"):
        settings(tmp_path, "ftp://me:secret@host/folder")


class Run:
    """What a mirror is told and tells."""

    def __init__(self, port: Any, *, keep: int = 9, seconds: float = 5.0) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.done: list[int] = []
        policy = RetentionPolicy(last=keep)
        self.mirror = CheckpointMirror(
            port,
            gather=self.gather,
            kept=lambda steps, newest, serving: policy.kept(steps, newest=newest, scores={}, serving=serving),
            done=self.done.append,
            report=lambda event, **details: self.events.append((event, details)),
            seconds=seconds,
            pause=0.0,
        )
        self.gathered: list[int] = []

    def gather(self, step: int) -> Mapping[str, Path]:
        self.gathered.append(step)
        return {"checkpoint/this": Path(__file__)}

    def of(self, event: str) -> list[dict[str, Any]]:
        return [details for name, details in self.events if name == event]


async def test_failed_copies_are_tried_again_and_a_location_that_stays_away_ends_nothing() -> None:
    class TheirError(Exception):
        """No OSError: client libraries have trees of their own."""

    location = MirrorLocation("failing://bucket", run="r")
    run = Run(location)
    FailingFileSystem.refusals[:] = [TheirError("503\nmore"), OSError("reset")]
    run.mirror.add(1)
    await run.mirror.finish()
    assert location.steps() == [1] and run.gathered == [1], "gathered once, whatever an earlier attempt still writes"
    causes = [details["cause"] for details in run.of("checkpoint copy failed")]
    assert causes == [
        "failing://bucket/r: cannot write step 1 (OSError: reset)",
        "failing://bucket/r: cannot write step 1 (TheirError: 503)",
    ]
    FailingFileSystem.refusals[:] = [OSError("away")] * 99
    run.mirror.add(2)
    await run.mirror.finish()
    assert len(run.of("checkpoint copy failed")) == 2 + ATTEMPTS - 1
    assert [details["step"] for details in run.of("checkpoint not copied")] == [2]
    FailingFileSystem.refusals.clear()
    run.mirror.add(3)
    await run.mirror.finish()
    assert location.steps() == [1, 3] and run.done == [1, 2, 3]
    with fsspec.open("failing://bucket/r/latest") as pointer:
        assert pointer.read() == b"step-000003"


class SlowPort:
    """Records the order of calls; uploads wait until they are let go."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.go = threading.Event()
        self.begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.there: list[int] = []

    def upload(self, step: int, files: Mapping[str, Path]) -> None:
        self.calls.append(("upload", step))
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.go.wait(30)
        self.there.append(step)

    def point(self, step: int) -> None:
        self.calls.append(("point", step))

    def steps(self) -> list[int]:
        return sorted(self.there)

    def remove(self, step: int) -> None:
        self.calls.append(("remove", step))
        self.there.remove(step)


async def test_the_run_goes_on_meanwhile_and_the_newest_of_those_that_wait_is_next() -> None:
    port = SlowPort()
    run = Run(port, keep=1)
    run.mirror.add(2, serving=2)
    await port.begun.wait()
    for step, serving in ((4, 4), (6, 4), (8, 4)):
        run.mirror.add(step, serving=serving)
    assert run.mirror.held == {2, 4, 8}, "what is copied, what the round needs, and the newest"
    assert run.of("checkpoint copy skipped") == [{"step": 6, "newer": 8}]
    port.go.set()
    await run.mirror.finish()
    assert run.mirror.held == set()
    assert port.calls == [
        *(("upload", 2), ("point", 2), ("upload", 4), ("point", 4), ("remove", 2)),
        *(("upload", 8), ("point", 8)),
    ], "the pointer comes after the files, and the round's beginning stays"
    assert port.there == [4, 8]


async def test_a_location_that_hangs_is_given_up() -> None:
    port = SlowPort()
    run = Run(port, seconds=0.01)
    run.mirror.add(1)
    async with asyncio.timeout(20):
        await run.mirror.finish()
    (given_up,) = run.of("checkpoint not copied")
    assert given_up["cause"] == "no answer within checkpoint.mirror_seconds=0.01"
    assert ("point", 1) not in port.calls
    port.go.set()


async def test_a_checkpoint_under_way_to_the_mirror_outlives_its_turn(tmp_path: Path) -> None:
    held = {1}
    store = CheckpointStore(tmp_path, keep_last=1, held=lambda: held)
    for step in (1, 2, 3):
        await store.write(step, write)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000001", "step-000003"]
    held.clear()
    await store.write(4, write)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000004"]


def test_a_missing_checkpoint_cannot_be_gathered(tmp_path: Path) -> None:
    with pytest.raises(MirrorError, match="what belongs to step 3 cannot be gathered"):
        gather(tmp_path, 3, tmp_path / "staging", with_ledger=False)
