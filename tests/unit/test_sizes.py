"""Files, classes and functions stay small enough to be read at once."""

from __future__ import annotations

import ast
import re

from tests.unit.test_layers import MODULES, TREES

LINES, CLASS_LINES, METHODS, FUNCTION_LINES, PARAMETERS = 400, 250, 20, 50, 6
ANYS_PER_1000_LINES = 15
LONG_FILES: dict[str, str] = {}
LARGE_CLASSES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
MANY_PARAMETERS = {
    "session.inference_session.InferenceSessionProxy.__init__": "public constructor: onnxruntime's, and ours",
    "session.execution_session.ExecutionSession.__init__": "public constructor",
    "errors.WorkerDied.__init__": "public constructor: each argument is an attribute that callers read",
}
"""Exceptions: module, class or function, and the reason."""
FACE_OF_ONNXRUNTIME = {
    "session.inference_session.InferenceSessionProxy",
    "session.io_binding.IOBinding",
    "session.introspection.SessionProxy",
}
"""Methods that onnxruntime's own classes have are not counted here; tests/contract holds them to it."""


def classes() -> list[tuple[str, ast.ClassDef]]:
    return [
        (f"{module}.{node.name}", node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    owners = {id(method): f"{name}." for name, cls in classes() for method in cls.body}
    return [
        (owners.get(id(node), f"{module}.") + node.name, node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def height(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def methods(name: str, cls: ast.ClassDef) -> int:
    found = {node.name for node in cls.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if name in FACE_OF_ONNXRUNTIME:
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_inference_collection as own

        found -= {*dir(ort.InferenceSession), *dir(ort.IOBinding), *vars(own.Session)}
    return len(found)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = node.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_files() -> None:
    long = {name for name, path in MODULES.items() if path.read_text().count("\n") > LINES}
    assert long == LONG_FILES.keys()


def test_classes() -> None:
    large = {n for n, cls in classes() if height(cls) > CLASS_LINES or methods(n, cls) > METHODS}
    assert large == LARGE_CLASSES.keys()


def test_functions() -> None:
    assert {name for name, node in functions() if height(node) > FUNCTION_LINES} == LONG_FUNCTIONS.keys()


def test_parameters() -> None:
    assert {name for name, node in functions() if parameters(node) > PARAMETERS} == MANY_PARAMETERS.keys()


def test_few_values_of_any_type() -> None:
    texts = [path.read_text() for path in MODULES.values()]
    lines = sum(text.count("\n") for text in texts)
    assert sum(len(re.findall(r"\bAny\b", text)) for text in texts) * 1000 <= ANYS_PER_1000_LINES * lines
