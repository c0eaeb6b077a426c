"""Ray nodes in network namespaces of one machine, on one bridge; needs root and the command ``ip``."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

    def ray_id(self) -> str:
        """Ray's name of the node, from its raylet's command line."""
        (found,) = {name for pid in self.pids() for name in re.findall(r"--node_id=(\w+)", _title(pid))}
        return str(found)

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
