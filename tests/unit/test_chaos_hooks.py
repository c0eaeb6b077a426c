"""The chaos harness breaks methods by name: a name that is gone would let it break nothing, in silence."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def hooks() -> list[tuple[str, str, str]]:
    """Module, class and method of each hook, from the file that every process of a run executes at its start."""
    spec = importlib.util.spec_from_file_location("chaos_hooks", ROOT / "benchmarks/chaos_hooks/sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.WORK)


@pytest.mark.parametrize(("module", "owner", "method"), hooks())
def test_every_hook_names_a_method_that_is_there(module: str, owner: str, method: str) -> None:
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    assert method in {node.name for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
