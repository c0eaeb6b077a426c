"""Who may import what: read from the source, and tried in a fresh interpreter."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
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
WITH_TORCH = {"pilaf_ray.sampling.draw", "pilaf_ray.sampling.interpolation", "pilaf_ray.sampling.replay"}
CORE = [
    "pilaf_ray.types",
    "pilaf_ray.errors",
    "pilaf_ray.cli",
    *modules("config", "store", "pipeline", "observability", "evaluation", "console", "exchange"),
    *(name for name in modules("sampling") if name not in WITH_TORCH),
]


def import_without(missing: tuple[str, ...], names: list[str]) -> str:
    """Import ``names`` in a fresh interpreter that cannot find ``missing``; returns what it complained of."""
    program = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError("not installed: " + name, name=name)
sys.meta_path.insert(0, Missing())
for module in {names!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def test_core_imports_without_engines() -> None:
    assert import_without(HEAVY, CORE) == ""


def test_losses_need_torch_only() -> None:
    assert import_without(("vllm", "deepspeed", "ray", "transformers"), modules("losses")) == ""


def test_ray_cannot_start_here(forbid_ray: Callable[[], None]) -> None:
    ray = pytest.importorskip("ray")
    forbid_ray()
    with pytest.raises(AssertionError, match="unit test started Ray"):
        ray.init()
