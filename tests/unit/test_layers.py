"""Who may import whom: an upper layer imports lower ones, never the reverse."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import onnx_dl

ROOT = Path(onnx_dl.__file__).parent
# From the bottom.  A room is a module, or a package with all that is in it.
HEIGHT = {
    "concurrency": -1,
    "waits": 0,
    "errors": 0,
    "files": 0,
    "forking": 1,
    "descriptors": 1,
    "owned": 1,
    "standing": 1,
    "procfs": 1,
    "tasks": 3,
    "surroundings": 2,
    "interpreters": 1,
    "frozen": 1,
    "boot": 3,
    "hosttables": 1,
    "smallfiles": 1,
    "tomllines": 1,
    "lifecycle": 1,
    "environment": 1,
    "model": 1,
    "config": 1,
    "terms": 2,
    "deadline": 1,
    "threads": 2,
    "background": 4,
    "events": 2,
    "telling": 4,
    "workerlines": 3,
    "backlog": 2,
    "builds": 1,
    "installation": 2,
    "makers": 2,
    "external": 2,
    "hook": 15,
    "hostfile": 2,
    "patchsettings": 2,
    "machine": 2,
    "recorder": 2,
    "remarks": 2,
    "rendezvous": 5,
    "census": 6,
    "values": 3,
    "recorded": 4,
    "transport": 4,
    "options": 5,
    "signatures": 5,
    "nodes": 6,
    "sources": 6,
    "acquisition": 7,
    "client": 7,
    "serving": 7,
    "connection": 7,
    "watch": 7,
    "supervisor": 7,
    "workers": 7,
    "eventloops": 2,
    "on_asyncio": 3,
    "on_trio": 3,
    "asynchronous": 8,
    "callbacks": 8,
    "host": 9,
    "hosts": 10,
    "starting": 8,
    "binding": 11,
    "native": 11,
    "proxy": 11,
    "described": 12,
    "feeds": 12,
    "session": 13,
    "execution": 13,
    "pipelines": 14,
    "patching": 14,
    "trials": 11,
    "doctor": 12,
    "examination": 13,
    "console": 14,
    "demo": 15,
    "launch": 15,
    "supervise": 15,
    "cli": 16,
    "__main__": 17,
    "__pyinstaller": 17,
}
# Who may import each other on one floor; client, supervisor and workers are strangers.
GROUPS = [
    {"acquisition", "client", "connection", "serving", "watch"},
    {"environment", "lifecycle", "model", "config"},
]
ENGINE = {"workers.ort", "workers.ort_calls", "workers.ort_session"}
ZMQ = {
    "transport.sockets",
    "transport.calls",
    "transport.lane",
    "workers.loop",
}


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


def rooms(name: str) -> set[str]:
    """Rooms of onnx_dl that a module imports from."""
    return {imported.split(".")[1] for imported in imports(name) if imported.startswith("onnx_dl.")}


def outside(name: str, *, lazy: bool = True) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name, lazy=lazy)}


def test_every_room_has_its_floor():
    assert {name.split(".")[0] for name in MODULES} - {""} <= set(HEIGHT), "add the new module to HEIGHT"


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_down(name):
    own = name.split(".")[0]
    for room in rooms(name) - {own}:
        group = next((g for g in GROUPS if own in g), set())
        floors = HEIGHT[own] == HEIGHT[room]
        assert HEIGHT[room] < HEIGHT[own] or (floors and room in group), f"{name} must not import {room}"


def test_only_these_import_zmq():
    assert {name for name in MODULES if "zmq" in outside(name)} == ZMQ


def test_metrics_cost_nothing_where_nobody_wants_them():
    users = {name for name in MODULES if "prometheus_client" in outside(name)}
    assert users == {"supervisor.families"}
    for name in MODULES:
        if name != "supervisor.scrape":
            eager = imports(name, lazy=False)
            assert not [
                i for i in eager if i.startswith(("onnx_dl.supervisor.scrape", "onnx_dl.supervisor.families"))
            ]


@pytest.mark.parametrize("library", ["psutil", "pynvml"])
def test_only_the_probe_measures(library):
    users = {name for name in MODULES if library in outside(name)}
    assert {name for name in users if not name.startswith("demo")} == {"supervisor.probe"}


def test_engine_is_imported_eagerly_by_its_backend_only():
    assert {name for name in MODULES if "onnxruntime" in outside(name, lazy=False)} == ENGINE


def test_sockets_are_imported_by_transport_only():
    users = {name for name in MODULES if "socket" in outside(name)}
    assert users == {
        "concurrency",
        "transport.dealer",
        "transport.face",
        "transport.router",
        "transport.sockets",
    }


@pytest.mark.parametrize(
    "name",
    [
        "supervisor.admission",
        "supervisor.ledger",
        "supervisor.metrics",
        "supervisor.needs",
        "supervisor.records",
        "supervisor.room",
        "supervisor.saving",
        "supervisor.scheduler",
        "supervisor.solitude",
        "supervisor.thrash",
        "workers.gate",
    ],
)
def test_pure_modules_know_no_clocks_processes_or_sockets(name):
    assert not outside(name) & {"time", "os", "socket", "zmq", "subprocess", "signal", "select", "psutil"}


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
