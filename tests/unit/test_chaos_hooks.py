"""The chaos harness breaks methods by name: a name that is gone would let it break nothing, in silence."""

import ast
import importlib.util
import os
import random
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import network_cut, small_disk
from benchmarks.chaos_books import look
from benchmarks.chaos_faults import Cell, cell, choose, free_roles
from benchmarks.chaos_hooks import sitecustomize as hooks
from benchmarks.chaos_job import FAULTS, MORE, ROLES, Fault, _is_own, own_name

ROOT = Path(__file__).parents[2]
PLACES = sorted({*hooks.WORK, *((module, owner, method) for _, module, owner, method in hooks.PHASES)})


def source(module: str) -> str:
    package, _, rest = module.partition(".")
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations is not None
    return (Path(found.submodule_search_locations[0]) / f"{rest.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize(("module", "owner", "method"), PLACES)
def test_every_hook_names_a_method_that_is_there(module: str, owner: str, method: str) -> None:
    (found,) = [
        node for node in ast.parse(source(module)).body if isinstance(node, ast.ClassDef) and node.name == owner
    ]
    assert method in {node.name for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_a_trap_springs_once_and_strikes_whoever_it_names(tmp_path: Path) -> None:
    orders = hooks.Orders(tmp_path)
    (tmp_path / "trap-training").write_text('{"pid": 0, "fault": "exception", "delay": 0.0}')
    with pytest.raises(RuntimeError, match="chaos"):
        orders._enter("training")
    assert (tmp_path / "sprung-training").is_file()
    orders._enter("training")  # nothing is left to be taken
    (tmp_path / "trap-sampling").write_text(f'{{"pid": {os.getppid()}, "fault": "exception", "delay": 0.0}}')
    orders._enter("sampling")
    assert (tmp_path / f"raise-{os.getppid()}").is_file()


def test_a_wrapped_method_acts_before_each_call() -> None:
    done: list[str] = []
    owner = type("Owner", (), {"work": lambda _self: done.append("work")})
    hooks._before(owner, "work", lambda: done.append("hook"))
    method: Callable[[], None] = owner().work
    method()
    assert done == ["hook", "work"]


def test_every_cell_is_met_before_any_is_met_twice() -> None:
    roles, draw = list(ROLES), random.Random(3)
    counts: Counter[Cell] = Counter()
    for _ in range(len(roles) * (len(FAULTS) * 6 + len(MORE)) - len(FAULTS)):
        counts[cell(choose(draw, roles, counts))] += 1
    assert set(counts.values()) == {1}
    assert ("reward model", "SIGKILL", "resume") not in counts


def test_faults_at_once_can_be_told_apart() -> None:
    roles = list(ROLES)
    assert free_roles(roles, []) == roles
    assert free_roles(roles, ["generator"]) == ["reference", "oracle", "preference store"]
    assert free_roles(roles, ["oracle", "learner"]) == []
    assert Fault(role="oracle", kind="SIGKILL", moment="weight sync.pull").phase == "weight sync"


@pytest.mark.parametrize(("job", "own"), [(None, True), ("ffffffff", True), ("01000000", True), ("02000000", False)])
def test_roles_of_another_run_in_the_same_cluster_are_left_alone(job: str | None, own: bool) -> None:
    environment = {"PATH": "/bin"} | ({} if job is None else {"RAY_JOB_ID": job})
    with subprocess.Popen(["ray::_Store", "60"], executable="/bin/sleep", env=environment) as process:
        try:
            found = psutil.Process(process.pid)
            # A process that has just begun has no environment to read for a moment.
            while not found.environ():
                os.sched_yield()
            assert _is_own(found) is own
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/lib/ray/gcs/gcs_server --log_dir=/tmp", "ray gcs_server"),
        ("/lib/ray/raylet/raylet --worker_command=/bin/python /lib/ray/setup_worker.py", "ray raylet"),
        ("/bin/python -u /lib/ray/_private/log_monitor.py --logs-dir=/tmp", "ray log_monitor"),
        ("ray::DashboardAgent", "ray DashboardAgent"),
        ("", "ray process"),
    ],
)
def test_processes_of_rays_are_told_apart(called: str, name: str) -> None:
    assert own_name(called) == name


def test_a_run_without_a_ledger_has_lost_nothing(tmp_path: Path) -> None:
    found = look(SimpleNamespace(path=tmp_path).path)
    assert (found.labels, found.labels_lost, found.counted_twice) == (0, [], [])


@pytest.mark.skipif(not network_cut.available(), reason="no right to destroy connections, or no ss")
def test_a_process_that_is_cut_off_has_lost_its_connections_and_may_open_new_ones() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
            assert network_cut.cut(os.getpid()) >= 1
            with pytest.raises(OSError, match=r"abort|reset|pipe"):
                client.sendall(b"x")
        with socket.create_connection(server.getsockname()) as client, server.accept()[0]:
            client.sendall(b"x")


def test_a_slowed_process_goes_on_and_is_fast_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "SLOW_SECONDS", 2)
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            states, begun = set[str](), time.monotonic()
            hooks.strike(process.pid, "slow", tmp_path)
            while time.monotonic() < begun + 3.0:
                states.add(psutil.Process(process.pid).status())
            assert states >= {psutil.STATUS_STOPPED, psutil.STATUS_SLEEPING}
            assert psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING
        finally:
            process.kill()


def _may_mount(folder: Path) -> bool:
    try:
        with small_disk.small_disk(folder, mib=1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def test_a_small_disk_is_full_to_the_last_byte_until_room_is_made(tmp_path: Path) -> None:
    if not _may_mount(tmp_path / "disk"):
        pytest.skip("no right to mount")
    with small_disk.small_disk(tmp_path / "disk", mib=1):
        small_disk.fill(tmp_path / "disk")
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "disk" / "more").write_text("x")
        small_disk.make_room(tmp_path / "disk")
        (tmp_path / "disk" / "more").write_text("x")
