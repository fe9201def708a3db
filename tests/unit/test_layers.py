"""Who may import whom: an upper layer imports lower ones, never the reverse."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import onnx_dl

ROOT = Path(onnx_dl.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, *, lazy: bool = True) -> set[str]:
    """Absolute names that a module imports; those within functions too, if ``lazy``."""
    tree = ast.parse(MODULES[name].read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(function, ast.If) and "TYPE_CHECKING" in ast.unparse(function.test))
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in inner and not lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def outside(name: str, *, lazy: bool = True) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name, lazy=lazy)}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return {name.split(".")[0] for name in done.stdout.split()}


HEAVY = {"onnxruntime", "numpy", "zmq", "psutil", "pynvml", "msgspec", "rich"}


def test_importing_the_package_imports_nothing_heavy():
    assert not loaded_by("import onnx_dl") & HEAVY


def test_taking_the_class_imports_no_onnxruntime():
    assert "onnxruntime" not in loaded_by("from onnx_dl import InferenceSessionProxy")


def test_public_names_exist():
    for name in onnx_dl.__all__:
        assert getattr(onnx_dl, name).__name__ == name or name == "InferenceSession" or name == "default_host"
    assert set(onnx_dl.__all__) <= set(dir(onnx_dl))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        onnx_dl.Nonsense  # noqa: B018
