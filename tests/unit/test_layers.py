"""The table of packages: who may import whom, also by name and inside of functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import onnx_dl

ROOT = Path(onnx_dl.__file__).parent
BASE = {"errors", "linux_only", "concurrency", "system", "core"}
MAY_IMPORT = {
    "errors": set(),
    "linux_only": {"errors"},
    "concurrency": {"errors", "linux_only"},
    "core": {"errors", "linux_only"},
    "system": {"errors", "linux_only", "concurrency", "core"},
    "ort": {"errors", "concurrency", "core"},
    "protocol": {"errors", "core"},
    "tensors": {*BASE, "ort", "protocol"},
    "transport": {*BASE, "protocol", "tensors"},
    "client": {
        *BASE, "protocol", "transport", "tensors.shared_arrays", "tensors.call_codec", "tensors.call_plans",
        "tensors.foreign", "tensors.foreign_results",
    },
    "supervisor": {
        *BASE, "transport", "tensors.segment",
        "protocol.codec", "protocol.control", "protocol.failures", "protocol.template",
    },
    "workers": {*BASE, "ort", "protocol", "tensors", "transport"},
    "session": {*BASE, "ort", "tensors", "client"},
    "inprocess": {
        *BASE, "protocol", "tensors", "transport.gauges", "client", "supervisor.policy", "workers.gate",
        "workers.engines",
    },
    "host": {*BASE, "client", "session", "inprocess"},
    "integrations": {*BASE, "client.host_client", "session", "host"},
    "demo": {*BASE, "client.event_dispatch", "session", "host"},
    "server": {*BASE, "ort", "protocol.failures", "tensors", "client", "session", "host", "demo"},
    "cli": {
        *BASE, "ort", "protocol", "transport", "client", "supervisor", "workers", "host",
        "integrations", "demo", "server",
    },
    "__main__": {"cli"},
}  # fmt: skip
"""Package to the packages and modules that it may import.  A package may import itself."""
ENTRIES = {
    "cli.doctor.trials", "demo.inprocess", "server.processes.child", "supervisor.main", "workers.saver",
    "workers.template",
}  # fmt: skip
BY_NAME = {
    "system.boot": ENTRIES,  # each is the main module of a process of its own
    "cli.hook.sitecustomize": {"integrations.onnxruntime_patch"},
}
"""Modules that may name others in text, and which: that is no import where they stand."""
FOR_TYPES_ONLY = {name: {"core.status"} for name in ("core.snapshot_table", "core.snapshot_text")}
"""Imports that only type checkers see and that would close a circle: a snapshot prints itself as a table."""
PURE = {"time", "os", "socket", "zmq", "subprocess", "signal", "select", "psutil", "threading"}
ENGINE = {
    "workers.engines.ort", "workers.engines.ort_bindings", "workers.engines.ort_methods",
    "workers.engines.ort_session",
}  # fmt: skip
ZMQ = {"transport.zeromq", "transport.zmq_channel", "workers.worker"}
MOST_AT_THE_TOP = 8
ONLY_ON_UNIX = {
    "fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog", "posix", "readline", "curses",
    "spwd", "crypt", "nis", "ossaudiodev", "_posixsubprocess", "_posixshmem",
}  # fmt: skip
"""Modules that CPython has on Linux, or on Unix, only."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def inside_functions(tree: ast.Module) -> set[int]:
    """Ids of nodes that do not run at an import."""
    return {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(function, ast.If) and "TYPE_CHECKING" in ast.unparse(function.test))
        for node in ast.walk(function)
    }


def imports(name: str, *, lazy: bool = True) -> set[str]:
    """Absolute names that a module imports; those within functions too, if ``lazy``."""
    inner = set() if lazy else inside_functions(TREES[name])
    found = set()
    for node in ast.walk(TREES[name]):
        if id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def documentation(tree: ast.Module) -> set[int]:
    """Ids of constants that stand alone: docstrings."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def named(name: str) -> set[str]:
    """Our modules that stand in text of a module, as arguments of ``import_module`` do."""
    found = set()
    skipped = documentation(TREES[name])
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            for dotted in re.findall(r"\bonnx_dl((?:\.\w+)+)", node.value):
                found |= {ours(f"onnx_dl{dotted}")} - {None, name}
    return found


def ours(imported: str) -> str | None:
    """The module that an absolute name is in, relative to the package; None: it is not ours."""
    parts = imported.split(".")
    if parts[0] != "onnx_dl":
        return None
    for end in range(len(parts), 1, -1):
        if (found := ".".join(parts[1:end])) in MODULES:
            return found
    return ""


def uses(name: str) -> set[str]:
    """Our modules that a module imports, in whatever way."""
    found = {ours(imported) for imported in imports(name)} | named(name) - BY_NAME.get(name, set())
    return {module for module in found if module}


def outside(name: str, *, lazy: bool = True) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name, lazy=lazy)}


def within(module: str, places: set[str]) -> bool:
    """Whether a module is one of the places or lies in one."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_what_its_package_may(name: str) -> None:
    package = name.split(".")[0]
    foreign = {module for module in uses(name) if not within(module, {package, *MAY_IMPORT[package]})}
    assert not foreign, f"{package} must not import {foreign}"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"cli.hook.sitecustomize"}))
def test_nothing_is_imported_from_the_face(name: str) -> None:
    """What stands in ``onnx_dl/__init__.py`` is for users: to import it from here would close a circle."""
    assert not {imported for imported in imports(name) if ours(imported) == "" or imported == "onnx_dl"}


@pytest.mark.parametrize("name", MODULES)
def test_what_is_imported_is_there(name: str) -> None:
    """Also where the error of an import is suppressed, or the import is in a function that no test calls."""
    wanted = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            wanted.add(node.module or "")
    assert not {each for each in wanted if each.startswith("onnx_dl.") and each[8:] not in MODULES}


def test_what_is_named_in_text_is_known() -> None:
    assert {name: named(name) for name in BY_NAME} == BY_NAME


def test_a_name_in_text_is_seen() -> None:
    """``import_module`` with a constant or an f-string is an import like others."""
    source = 'import_module("onnx_dl.session.proxy"); import_module(f"onnx_dl.workers.engines.{x}")'
    TREES["tried"] = ast.parse(source)
    try:
        assert named("tried") == {"session.proxy", "workers.engines"}
    finally:
        del TREES["tried"]


def test_no_circle() -> None:
    """Also counting imports by name and inside of functions."""
    graph = {name: uses(name) - {name} - FOR_TYPES_ONLY.get(name, set()) for name in MODULES if name}
    size = None
    while size != len(graph):
        size = len(graph)
        used = set().union(*graph.values())
        graph = {
            name: uses & graph.keys() for name, uses in graph.items() if uses & graph.keys() and name in used
        }
    assert not graph, f"these import each other: {graph}"


def test_few_files_at_the_top() -> None:
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= MOST_AT_THE_TOP


@pytest.mark.parametrize("name", [n for n, p in MODULES.items() if p.name == "__init__.py" and n])
def test_a_package_says_what_it_is_for(name: str) -> None:
    text = ast.get_docstring(TREES[name]) or ""
    assert 2 <= len(text.splitlines()) <= 4 or name in {"demo", "integrations.__pyinstaller"}
    assert len(TREES[name].body) == 1 or name == "integrations.__pyinstaller", "a package hands nothing on"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"linux_only"}))
def test_what_may_be_missing_elsewhere_comes_from_one_place(name: str) -> None:
    """Python has these modules on Linux, or on Unix, only: an import fails elsewhere.  So does the C library
    by this way, and a hook around forks."""
    assert not {module for module in outside(name) if module in ONLY_ON_UNIX}
    text = ast.unparse(TREES[name])
    assert "DLL(None)" not in text and "os.register_at_fork" not in text


def test_only_these_import_zmq() -> None:
    assert {name for name in MODULES if "zmq" in outside(name)} == ZMQ


def test_metrics_cost_nothing_where_nobody_wants_them() -> None:
    users = {name for name in MODULES if "prometheus_client" in outside(name)}
    assert users == {"supervisor.metrics.families", "server.metrics.families"}
    lazy = {"supervisor.metrics.endpoint", "supervisor.metrics.families"}
    for name in MODULES:
        if name != "supervisor.metrics.endpoint":
            assert not {ours(i) for i in imports(name, lazy=False)} & lazy


@pytest.mark.parametrize("library", ["psutil", "pynvml"])
def test_only_the_probe_measures(library: str) -> None:
    users = {name for name in MODULES if library in outside(name)}
    users = {name for name in users if not name.startswith("demo")}
    assert users <= {"supervisor.measure.memory_probe", "inprocess.memory", "server.metrics.machine"}


def test_engine_is_imported_eagerly_by_its_backend_only() -> None:
    assert {name for name in MODULES if "onnxruntime" in outside(name, lazy=False)} == ENGINE


def test_sockets_are_imported_by_transport_only() -> None:
    users = {name for name in MODULES if "socket" in outside(name) and not name.startswith("server.")}
    assert users == {
        "concurrency.primitives",
        "transport.dealer",
        "transport.router",
        "transport.sockets",
    }


@pytest.mark.parametrize(
    "name", [n for n in MODULES if n == "workers.gate" or n.startswith("supervisor.policy")]
)
def test_decisions_know_no_clocks_processes_or_sockets(name: str) -> None:
    locks = {"threading"} if name == "workers.gate" else set()
    assert not outside(name) & PURE - locks


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return {name.split(".")[0] for name in done.stdout.split()}


HEAVY = {"onnxruntime", "numpy", "zmq", "psutil", "pynvml", "msgspec", "rich"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not loaded_by("import onnx_dl") & HEAVY


def test_taking_the_class_imports_no_onnxruntime() -> None:
    assert "onnxruntime" not in loaded_by("from onnx_dl import InferenceSessionProxy")


def test_public_names_exist() -> None:
    for name in onnx_dl.__all__:
        assert getattr(onnx_dl, name).__name__ == name or name == "InferenceSession" or name == "default_host"
    assert set(onnx_dl.__all__) <= set(dir(onnx_dl))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        onnx_dl.Nonsense  # noqa: B018
