"""A run over Ray nodes on one machine that are lost, cut off, come and go: ``python -m benchmarks.nodes``.

Needs root and the commands ``ip`` and ``curl``. Each node is a raylet in a network namespace of its own, on one bridge:
everything between roles crosses a network whose addresses are not the machine's. The generator is on the first node, a
ZeRO-3 learner has one rank on each of two others.

``--fault loss``: when some steps are done every process of one learner's node is killed and a new node joins; the run
must rebuild its learner there. ``--fault partition --seconds 20``: that node's cable is drawn and put back after so
long, with a spare node standing by; what is cut off lives on and comes back. ``--fault drain``: generators follow the
cluster's nodes; one comes, and is drained as if it were preempted while its generator has work. Each time the run must
end, with books that add up; a console's page that another node cannot fetch is an error, too.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.chaos_books import Books, read_books
from benchmarks.chaos_job import ROOT, leave_nothing_behind
from benchmarks.node_spaces import ENVIRONMENT, HEAD, PORT, Node, bridge

BATCH_PAIRS = 4
"""Of a step of ``configs/tiny.yaml``."""


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


CONSOLE_TITLE = "Enter · nodes"
"""Of the page that the console shows to whoever has no token."""


class Fault(StrEnum):
    """What happens to a learner's node, or to a generator's."""

    LOSS = "loss"
    PARTITION = "partition"
    DRAIN = "drain"


def lose(run: NodesRun, nodes: list[Node], *, patience: float) -> dict[str, Any]:
    """Kill the last node for good; another one joins. Returns what is to be told."""
    head, lost = nodes[0], nodes[-1]
    asked = lost.command("curl", "-s", f"http://{head.address}:8321/enter")
    # Without an answer the page is empty, which is told with the rest.
    page = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    moment, killed = time.time(), lost.kill()
    spare = Node(len(nodes))
    nodes.append(spare)
    spare.start(pool="learner", cpus=1)
    run.wait(lambda: run.events("learner rebuilt"), patience)
    return {
        "console_from_another_node": titles(page),
        "processes_killed_with_their_node": killed,
        "seconds_until_the_learner_was_rebuilt": round(run.events("learner rebuilt")[0]["time"] - moment, 1),
    }


def cut_off(run: NodesRun, nodes: list[Node], *, seconds: float, patience: float) -> dict[str, Any]:
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
    run.wait(lambda: max(run.steps()) > steps or run.process.poll() is not None, patience)
    rebuilt = run.events("learner rebuilt")
    return {
        "seconds_cut": round(healed - moment, 1),
        "steps_while_cut": meanwhile,
        "seconds_from_healing_to_a_step": round(time.time() - healed, 1),
        "seconds_until_the_learner_was_rebuilt": [round(event["time"] - moment, 1) for event in rebuilt],
        "processes_of_the_node_before_and_at_the_end": [before, len(lost.pids())],
    }


def come_and_go(run: NodesRun, nodes: list[Node], *, patience: float) -> dict[str, Any]:
    """Let a node for a generator join, drain it once that one samples, then end it. Returns what is to be told."""
    new = Node(len(nodes))
    nodes.append(new)
    moment = time.time()
    new.start(pool="generator", cpus=1)
    run.wait(lambda: run.events("replica added"), patience)
    joined, steps = time.time(), max(run.steps())
    # Beyond those steps whose pairs were sampled before it came.
    run.wait(lambda: max(run.steps()) >= steps + 3, patience)
    hosted = new.hosts("ray::_Generator")
    drained = time.time()
    _drain(nodes[0], new)
    run.wait(lambda: run.events("replica removed"), patience)
    left = time.time()
    steps = max(run.steps())
    new.kill()
    run.wait(lambda: max(run.steps()) > steps, patience)
    run.process.terminate()
    return {
        "seconds_from_the_node_to_its_generator": round(joined - moment, 1),
        "its_generator_was_on_it": hosted,
        "seconds_from_the_notice_to_its_leave": round(left - drained, 1),
        "responses_handed_back": run.events("replica removed")[0]["handed_back"],
    }


def titles(page: str) -> list[str]:
    """Of an HTML page: one, if it is one."""
    return re.findall("<title>(.*)</title>", page)


def _drain(head: Node, node: Node) -> None:
    """As a cloud's notice of preemption does it."""
    ray = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", f"{HEAD}:{PORT}"]
    words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--node-id", node.ray_id()]
    command = head.command(*ray, *words, "--deadline-remaining-seconds", "600")
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, check=True)


def exit_code(told: Mapping[str, Any], books: Books, *, steps: int) -> int:
    """1 where the run failed, its books are not of ``steps`` steps, or another node could not read the console."""
    console = told.get("console_from_another_node", [CONSOLE_TITLE])
    right = Books(steps=steps, trained=BATCH_PAIRS * steps)
    return int(told["exit_code"] != 0 or books != right or console != [CONSOLE_TITLE])


def main(
    folder: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs"),
    steps: Annotated[
        int, typer.Option(min=4, help="Of the run; the fault comes after the third, and a drain ends it.")
    ] = 10,
    fault: Annotated[Fault, typer.Option(help="What happens to a learner's node.")] = Fault.LOSS,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long a partition lasts.")] = 20.0,
    patience: Annotated[
        float, typer.Option(min=1.0, help="Seconds for each thing that is waited for after the fault.")
    ] = 300.0,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the run.")] = None,
) -> None:
    """Lose a node or cut it off, and print what became of the run as JSON; exit code 1 if anything is wrong."""
    leave_nothing_behind()
    with bridge() as nodes:
        # Somewhere to go while a node is cut off; where one is killed for good, another joins afterwards.
        nodes += [Node(number) for number in range(4 if fault is Fault.PARTITION else 3)]
        head = nodes[0]
        # Where generators follow nodes they take what is free: the head has room for one.
        head.start(pool="generator", cpus=1 if fault is Fault.DRAIN else 2, head=True)
        for node in nodes[1:]:
            node.start(pool="learner", cpus=1)
        own = ["generation.elastic={least: 1, most: 2}"] if fault is Fault.DRAIN else []
        run = NodesRun(head, folder.resolve(), [f"run.max_steps={steps}", *own, *(overrides or [])])
        try:
            run.wait(lambda: len(run.steps()) >= 3, 600)
            before = max(run.steps())
            found = {
                Fault.LOSS: lambda: lose(run, nodes, patience=patience),
                Fault.PARTITION: lambda: cut_off(run, nodes, seconds=seconds, patience=patience),
                Fault.DRAIN: lambda: come_and_go(run, nodes, patience=patience),
            }[fault]()
            code = run.process.wait(patience)
            if fault is Fault.DRAIN:
                steps = len(run.steps())
        finally:
            run.process.terminate()
        books = read_books(run, batch_pairs=BATCH_PAIRS)
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
    raise typer.Exit(exit_code(told, books, steps=steps))


if __name__ == "__main__":
    typer.run(main)
