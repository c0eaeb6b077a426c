"""Models of URLs: fetched once on a node, whole or not at all, and one line where that cannot be."""

import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from model_stores import (
    CONTROL,
    FETCHED,
    MODEL,
    WEIGHTS,
    MoodyFileSystem,
    contents,
    fetch_alone,
    fetch_together,
    safetensors,
    write_model,
)

from pilaf_ray.engines import model_location, model_store
from pilaf_ray.engines.model_store import local_model, local_models, names_url, source_of
from pilaf_ray.errors import ModelError, ModelUnavailableError

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node's store, empty, and no pauses between attempts."""
    monkeypatch.setenv(model_store.FOLDER_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setattr(model_location, "PAUSE_SECONDS", 0.0)
    yield tmp_path / "store"
    MoodyFileSystem.forget()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def put(url: str, **changed: bytes) -> str:
    """The model at ``url``, some files of it changed."""
    files, root = fsspec.url_to_fs(url)
    for name, data in {**MODEL, **changed}.items():
        files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        files.pipe_file(f"{root}/{name}", data)
    return url


def line_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("scheme", ["memory", "file", "moody"])
def test_a_url_becomes_one_folder_with_what_is_there(scheme: str, tmp_path: Path, store: Path) -> None:
    url = put(f"{scheme}://{tmp_path}/bucket/a model")
    folder = Path(local_model(url))
    assert contents(folder) == FETCHED
    assert folder.parent.parent == store and folder.parent.name.startswith("a-model-")
    assert local_model(url) == local_model(url + "/") == str(folder), "the same model"
    assert sorted(path.name for path in folder.parent.iterdir() if path.name != "lock") == [folder.name]
    assert source_of(str(folder)) == url
    if scheme == "moody":
        assert sorted(MoodyFileSystem.fetched) == sorted(Path(name).name for name in FETCHED), "each file once"


@pytest.mark.parametrize("name", ["owner/model", "/some/folder", "relative/folder/model"])
def test_folders_and_hub_ids_stay_what_they_are(name: str, store: Path) -> None:
    assert local_model(name) == source_of(name) == name
    assert not store.exists()


def test_a_look_at_the_settings_fetches_no_weights() -> None:
    url = put("moody://bucket/model")
    settings = Path(local_model(url, weights=False))
    assert contents(settings) == {name: data for name, data in FETCHED.items() if name != WEIGHTS}
    assert local_model(url, weights=False) == str(settings)
    whole = Path(local_model(url))
    assert contents(whole) == FETCHED
    assert local_model(url, weights=False) == str(whole), "what is whole will do"


def test_changed_content_has_a_folder_of_its_own() -> None:
    url = put("memory://bucket/model")
    before = Path(local_model(url))
    put(url, **{WEIGHTS: safetensors(bytes(256))})
    after = Path(local_model(url))
    assert before.parent == after.parent and before != after
    assert contents(before) == FETCHED, "who reads the old one goes on"
    assert contents(after)[WEIGHTS] == safetensors(bytes(256))


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where other processes tell what they fetch."""
    folder = tmp_path / "control"
    folder.mkdir()
    monkeypatch.setenv(CONTROL, str(folder))
    return folder


def fetched(control: Path) -> list[tuple[str, str]]:
    """(process, file) in order."""
    return [(line.split()[0], line.split()[1]) for line in (control / "fetched").read_text().splitlines()]


def test_of_processes_that_race_one_fetches_and_all_get_the_same(tmp_path: Path, control: Path) -> None:
    url = f"counted://{write_model(tmp_path / 'bucket')}"
    barrier, found = SPAWN.Barrier(3), SPAWN.Queue()
    processes = [SPAWN.Process(target=fetch_together, args=(url, barrier, found)) for _ in range(3)]
    for process in processes:
        process.start()
    folders = {found.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (folder,) = folders
    assert contents(Path(folder)) == FETCHED
    assert sorted(name for _, name in fetched(control)) == sorted(Path(name).name for name in FETCHED)
    assert len({process for process, _ in fetched(control)}) == 1


def test_what_a_killed_process_leaves_is_taken_for_nothing_and_cleared(tmp_path: Path, control: Path) -> None:
    url = f"counted://{write_model(tmp_path / 'bucket')}"
    for pipe in ("halfway", "never", "waiting"):
        os.mkfifo(control / pipe)
    (control / "hold").touch()
    first = SPAWN.Process(target=fetch_alone, args=(url,))
    first.start()
    (control / "halfway").read_text()  # returns once half of the weights is written
    (control / "hold").unlink()
    second = SPAWN.Process(target=fetch_alone, args=(url,))
    second.start()
    (control / "waiting").read_text()
    (shelf,) = (tmp_path / "store").iterdir()
    (leftover,) = shelf.glob("tmp.*")
    assert len((leftover / WEIGHTS).read_bytes()) == len(MODEL[WEIGHTS]) // 2
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join(60)
    second.join(120)
    assert second.exitcode == 0
    (folder,) = (path for path in shelf.iterdir() if path.name != "lock")
    assert contents(folder) == FETCHED
    assert [name for process, name in fetched(control) if process == str(second.pid)].count(WEIGHTS) == 1
    assert local_model(url) == str(folder)


class TheirError(Exception):
    """No OSError: client libraries have trees of their own."""


def test_a_store_that_does_not_answer_is_asked_again() -> None:
    url = put("moody://bucket/model")
    MoodyFileSystem.refusals[:] = [TheirError("503\nmore"), OSError("reset"), TheirError("slow down")]
    assert contents(Path(local_model(url))) == FETCHED


def test_a_store_that_stays_away_is_one_line_and_a_copy_from_before_will_do(caplog: pytest.LogCaptureFixture) -> None:
    url = put("moody://bucket/model")
    MoodyFileSystem.refusals[:] = [TheirError("503\nmore")] * 5
    with pytest.raises(ModelUnavailableError) as error:
        local_model(url)
    assert line_of(error).startswith(f"{url} cannot be listed (TheirError: 503), tried 5 times: try later, or check")
    settings = local_model(url, weights=False)
    MoodyFileSystem.refusals[:] = [OSError("away")] * 5
    with pytest.raises(ModelUnavailableError):
        local_model(url)  # settings are no model
    folder = local_model(url)
    MoodyFileSystem.refusals[:] = [OSError("away")] * 10
    assert local_model(url) == folder
    assert local_model(url, weights=False) in (folder, settings)
    assert f"going on with the copy that is here: {folder}" in caplog.text


def test_a_short_file_is_one_line_and_leaves_nothing(store: Path) -> None:
    url = put("moody://bucket/model")
    MoodyFileSystem.short.add(WEIGHTS)
    with pytest.raises(ModelUnavailableError) as error:
        local_model(url)
    size = len(MODEL[WEIGHTS])
    assert line_of(error) == (f"{url}: {WEIGHTS} is short, 10 of {size} bytes came: start again, or upload it again")
    assert MoodyFileSystem.fetched.count(WEIGHTS) == model_location.ATTEMPTS
    assert not list(store.rglob("*.json")) and not list(store.rglob("tmp.*"))
    MoodyFileSystem.short.clear()
    assert contents(Path(local_model(url))) == FETCHED


INDEX = b'{"weight_map": {"x": "model.safetensors", "y": "model-2.safetensors"}}'
WRONG: dict[str, tuple[dict[str, bytes], str]] = {
    "cut in the store": ({WEIGHTS: MODEL[WEIGHTS][:-7]}, rf"{WEIGHTS} is short, it has \d+ of \d+ bytes: upload it"),
    "cut in its header": ({WEIGHTS: MODEL[WEIGHTS][:20]}, f"{WEIGHTS} is short, it has 20 bytes: upload it again"),
    "a shard missing": (
        {"model.safetensors.index.json": INDEX},
        r"model-2.safetensors is missing, of 2 files that model.safetensors.index.json names: upload it",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_that_are_not_whole_in_the_store_are_one_line(what: str, store: Path) -> None:
    changed, message = WRONG[what]
    url = put("memory://bucket/model", **changed)
    with pytest.raises(ModelError, match=message) as error:
        local_model(url)
    assert line_of(error).startswith(f"{url}: ")
    assert not list(store.rglob("config.json"))


def test_a_url_without_a_model_is_one_line(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/step/hf/config.json", b"{}")
    cases = {
        "memory://bucket/step": r"memory://bucket/step: no config\.json there \(but hf/config\.json\): name the folder",
        "memory://bucket/step/hf/config.json": r"there is nothing: name the folder of a model",
        "memory://nowhere/model": r"cannot be listed \(FileNotFoundError: .*\): check the URL, and this node's cred",
        f"file://{tmp_path}/no": r"cannot be listed \(FileNotFoundError: .*\): check the URL",
        "nonsense://x/y": r"nonsense://x/y cannot be opened \(Protocol not known: nonsense\); install what it needs",
    }
    for url, message in cases.items():
        with pytest.raises(ModelError, match=message) as error:
            local_model(url)
        line_of(error)


def test_no_room_and_no_right_to_write_are_one_line(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("memory://bucket/model")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(ModelError, match=r"GiB left: remove copies there that are not needed any more, or set PIL"):
            local_model(url)
    store.rename(store.with_name("aside"))
    store.write_text("a file")
    with pytest.raises(ModelError, match=rf"no copy can be kept in {store} \(.*\): set PILAF_RAY_MODELS to a folder"):
        local_model(url)


def test_a_model_that_changes_meanwhile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("memory://bucket/model")
    fetch = MemoryFileSystem.get_file

    def fetch_and_change(self: MemoryFileSystem, rpath: str, *arguments: Any, **settings: Any) -> None:
        fetch(self, rpath, *arguments, **settings)
        if rpath.endswith("tokenizer.json"):
            put(url, **{"tokenizer.json": b"{ }"})

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", fetch_and_change)
        with pytest.raises(ModelError, match="changed while it was fetched: start again once its upload is done"):
            local_model(url)
    assert contents(Path(local_model(url)))["tokenizer.json"] == b"{ }"


def test_arguments_of_roles_name_folders_of_the_node() -> None:
    url = put("memory://bucket/model")
    arguments = {
        "policy_path": url,
        "reference_path": "owner/model",
        "dump_folder": Path("runs/x"),
        "target": "other://not/a/model",
        "value": {"model_path": url, "layers": 2},
    }
    assert names_url(arguments) and names_url({"value": {"model_path": url}})
    found = local_models(arguments)
    folder = local_model(url)
    assert found == {**arguments, "policy_path": folder, "value": {"model_path": folder, "layers": 2}}
    assert arguments["policy_path"] == url, "what the driver has stays"
    local = {"path": "/a/folder", "target": "module:function"}
    assert not names_url(local) and local_models(local) == local


def test_what_is_saved_names_no_folder_of_the_store(tmp_path: Path, store: Path) -> None:
    import torch

    from pilaf_ray.data.tiny_models import make_tiny_llama
    from pilaf_ray.engines.scoring import load_network, write_hf_folder

    url = f"file://{make_tiny_llama(tmp_path / 'bucket', seed=0)}"
    network = load_network(local_model(url), dtype=torch.float32)
    write_hf_folder(network, dict(network.state_dict()), tmp_path / "hf")
    texts = [path.read_text() for path in (tmp_path / "hf").glob("*.json*")]
    assert len(texts) > 2
    assert not [text for text in texts if re.search(str(store), text)]
