"""A run over several Ray nodes on one machine, one of which is lost or cut off: ``python -m benchmarks.nodes``.

Needs root and the commands ``ip`` and ``curl``. Each node is a raylet in a network namespace of its own, on one bridge:
everything between roles crosses a network whose addresses are not the machine's. The generator is on the first node, a
ZeRO-3 learner has one rank on each of two others.

``--fault loss``: when some steps are done every process of one learner's node is killed and a new node joins; the run
must rebuild its learner there. ``--fault partition --seconds 20``: that node's cable is drawn and put back after so
long, with a spare node standing by; what is cut off lives on and comes back. Either way the run must end, with books
that add up.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.chaos_books import Books, read_books
from benchmarks.chaos_job import leave_nothing_behind

ROOT = Path(__file__).parents[1]
BRIDGE, PREFIX, PORT = "pilaf-br", "10.77.0", 6390
HEAD = f"{PREFIX}.10"
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_process_group_cleanup_enabled": "true",
    # As on clusters of several machines: nothing may rely on the loopback device being shared.
    "RAY_ADDRESS": f"{HEAD}:{PORT}",
}


def ip(*words: str) -> None:
    """The command of that name; raises where it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Node:
    """A network namespace with a raylet in it."""

    def __init__(self, number: int) -> None:
        self.name, self.address = f"pilaf-{number}", f"{PREFIX}.{10 + number}"
        self._cable = f"pilaf-v{number}"
        ip("netns", "add", self.name)
        ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self._cable, "master", BRIDGE, "up")
        for words in (("addr", "add", f"{self.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            ip("-n", self.name, *words)
        ip("-n", self.name, "link", "set", "lo", "up")

    def command(self, *words: str) -> list[str]:
        """``words`` inside the namespace."""
        return ["ip", "netns", "exec", self.name, *words]

    def start(self, *, pool: str, cpus: int, head: bool = False) -> None:
        """Start Ray here; the first node is the head."""
        ray = [str(Path(sys.executable).parent / "ray"), "start", f"--node-ip-address={self.address}"]
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"] if head else [f"--address={HEAD}:{PORT}"]
        labels = [f"--num-cpus={cpus}", f"--labels=pool={pool}", "--disable-usage-stats"]
        without = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        started = subprocess.run(
            self.command(*ray, *role, *labels),
            env={**without, **{key: value for key, value in ENVIRONMENT.items() if key != "RAY_ADDRESS"}},
            capture_output=True,
            text=True,
            check=False,
        )
        if started.returncode:
            raise RuntimeError(f"Ray does not start on {self.name}: {started.stdout}{started.stderr}")

    def pids(self) -> list[int]:
        """The node's processes."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(word) for word in listed.stdout.split()]

    def hosts(self, title: str) -> bool:
        """Whether a process that calls itself so is on the node."""
        return any(_title(pid).startswith(title) for pid in self.pids())

    def kill(self) -> int:
        """SIGKILL to everything on the node; returns how many processes that were."""
        pids = self.pids()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(pids)

    def cut(self) -> None:
        """Draw the node's cable; its processes live on."""
        ip("link", "set", self._cable, "down")

    def heal(self) -> None:
        """Put it back."""
        ip("link", "set", self._cable, "up")

    def remove(self) -> None:
        """End the node and its network."""
        self.kill()
        # A namespace whose last process is still dying would keep its end of the cable.
        ip("link", "del", self._cable)
        ip("netns", "del", self.name)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@contextmanager
def bridge() -> Iterator[list[Node]]:
    """The network; nodes that are put into the list are removed at the end."""
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("addr", "add", f"{PREFIX}.1/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    nodes: list[Node] = []
    try:
        yield nodes
    finally:
        for node in nodes:
            node.remove()
        ip("link", "del", BRIDGE)


class NodesRun:
    """The run, seen from outside; :func:`benchmarks.chaos_books.read_books` reads its files."""

    def __init__(self, head: Node, folder: Path, overrides: list[str]) -> None:
        self.path = folder / "nodes"
        self.log = folder / "nodes.log"
        folder.mkdir(parents=True, exist_ok=True)
        words = [
            str(ROOT / "configs/tiny.yaml"),
            f"run.folder={folder}",
            "run.name=nodes",
            "learner.ranks=2",
            "learner.zero_stage=3",
            "weights.transport=gloo",
            "checkpoint.every_steps=2",
            "resources.learner={cpus: 1, strategy: strict_spread, node_labels: {pool: learner}}",
            "resources.generator={cpus: 1, node_labels: {pool: generator}}",
            f"console={{serve: true, host: {head.address}, port: 8321}}",
            *overrides,
        ]
        self.process = subprocess.Popen(
            head.command(sys.executable, "-m", "pilaf_ray", "train", *words),
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def steps(self) -> list[int]:
        """Steps in metrics.jsonl."""
        return [int(line["step"]) for line in self._lines("metrics.jsonl")]

    def events(self, name: str) -> list[dict[str, Any]]:
        """All events of that name."""
        return [event for event in self._lines("events.jsonl") if event["event"] == name]

    def wait(self, condition: Callable[[], object], seconds: float) -> None:
        """Until ``condition`` holds; raises if the run ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"that did not happen; see {self.log}:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.path / name
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


class Fault(StrEnum):
    """What happens to a learner's node."""

    LOSS = "loss"
    PARTITION = "partition"


def lose(run: NodesRun, nodes: list[Node]) -> dict[str, Any]:
    """Kill the last node for good; another one joins. Returns what is to be told."""
    head, lost = nodes[0], nodes[-1]
    asked = lost.command("curl", "-s", f"http://{head.address}:8321/enter")
    page = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    moment, killed = time.time(), lost.kill()
    spare = Node(len(nodes))
    nodes.append(spare)
    spare.start(pool="learner", cpus=1)
    run.wait(lambda: run.events("learner rebuilt"), 300)
    return {
        "console_from_another_node": re.findall("<title>(.*)</title>", page),
        "processes_killed_with_their_node": killed,
        "seconds_until_the_learner_was_rebuilt": round(run.events("learner rebuilt")[0]["time"] - moment, 1),
    }


def cut_off(run: NodesRun, nodes: list[Node], *, seconds: float) -> dict[str, Any]:
    """Cut a node with a rank off for ``seconds``, while a spare one stands by. Returns what is to be told."""
    lost = next(node for node in reversed(nodes[1:]) if node.hosts("ray::_Learner"))
    before, steps, moment = len(lost.pids()), max(run.steps()), time.time()
    lost.cut()
    try:
        # What is measured is what goes on in so long a time.
        time.sleep(seconds)
        meanwhile = max(run.steps()) - steps
    finally:
        lost.heal()
    healed, steps = time.time(), max(run.steps())
    run.wait(lambda: max(run.steps()) > steps or run.process.poll() is not None, 300)
    rebuilt = run.events("learner rebuilt")
    return {
        "seconds_cut": round(healed - moment, 1),
        "steps_while_cut": meanwhile,
        "seconds_from_healing_to_a_step": round(time.time() - healed, 1),
        "seconds_until_the_learner_was_rebuilt": [round(event["time"] - moment, 1) for event in rebuilt],
        "processes_of_the_node_before_and_at_the_end": [before, len(lost.pids())],
    }


def main(
    folder: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs"),
    steps: Annotated[int, typer.Option(min=4, help="Of the run; the fault comes after the third.")] = 10,
    fault: Annotated[Fault, typer.Option(help="What happens to a learner's node.")] = Fault.LOSS,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long a partition lasts.")] = 20.0,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the run.")] = None,
) -> None:
    """Lose a node or cut it off, and print what became of the run as JSON; exit code 1 if anything is wrong."""
    leave_nothing_behind()
    with bridge() as nodes:
        # Somewhere to go while a node is cut off; where one is killed for good, another joins afterwards.
        nodes += [Node(number) for number in range(4 if fault is Fault.PARTITION else 3)]
        head = nodes[0]
        head.start(pool="generator", cpus=2, head=True)
        for node in nodes[1:]:
            node.start(pool="learner", cpus=1)
        run = NodesRun(head, folder.resolve(), [f"run.max_steps={steps}", *(overrides or [])])
        try:
            run.wait(lambda: len(run.steps()) >= 3, 600)
            before = max(run.steps())
            found = lose(run, nodes) if fault is Fault.LOSS else cut_off(run, nodes, seconds=seconds)
            code = run.process.wait(300)
        finally:
            run.process.terminate()
        books = read_books(run, batch_pairs=4)
        told = {
            "fault": fault.value,
            "nodes": {node.name: node.address for node in nodes},
            "steps_before": before,
            **found,
            "losses": [event["cause"] for word in ("learner lost", "replica lost") for event in run.events(word)],
            "exit_code": code,
            **asdict(books),
        }
    print(json.dumps(told, indent=1))
    if code or books != Books(steps=steps, trained=4 * steps):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
