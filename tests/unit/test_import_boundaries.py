"""Who may import what: read from the source, and tried in a fresh interpreter."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pilaf_ray

PACKAGE = Path(pilaf_ray.__file__).parent
HEAVY = ("torch", "vllm", "deepspeed", "ray", "transformers")


def imports(path: Path, *, only_top_level: bool) -> Iterator[str]:
    """Top-level names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    for node in tree.body if only_top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


def modules(*folders: str) -> list[str]:
    """Dotted names of all modules in the folders."""
    return sorted(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for folder in folders
        for path in (PACKAGE / folder).glob("*.py")
    )


def test_only_actors_import_ray() -> None:
    elsewhere = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "actors"]
    assert elsewhere
    assert [str(p) for p in elsewhere if "ray" in imports(p, only_top_level=False)] == []


def test_engines_load_only_where_they_are_used() -> None:
    everywhere = [path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("engines", "actors")]
    for name in ("vllm", "deepspeed"):
        assert [str(p) for p in everywhere if name in imports(p, only_top_level=False)] == []


# Tensor code and its neighbours; everything else in these folders is plain Python.
WITH_TORCH = {"pilaf_ray.sampling.interpolation", "pilaf_ray.sampling.replay"}
CORE = [
    "pilaf_ray.types",
    "pilaf_ray.errors",
    "pilaf_ray.cli",
    *modules("config", "store", "pipeline", "observability", "evaluation"),
    *(name for name in modules("sampling") if name not in WITH_TORCH),
]


def test_core_imports_without_engines() -> None:
    """One interpreter in which the heavy packages cannot be found at all."""
    program = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError("not installed: " + name, name=name)
sys.meta_path.insert(0, Missing())
for module in {CORE!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_losses_import_without_engines() -> None:
    program = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "deepspeed", "ray"):
            raise ModuleNotFoundError("not installed: " + name, name=name)
sys.meta_path.insert(0, Missing())
for module in {modules("losses")!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ray_cannot_start_here() -> None:
    ray = pytest.importorskip("ray")
    # The guard acts on what was imported when the test began.
    if hasattr(ray.init, "__wrapped__"):
        pytest.skip("ray was first imported by this very test")
    with pytest.raises(AssertionError, match="unit test started Ray"):
        ray.init()


def test_files_stay_readable() -> None:
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert long == {}
