"""The packages of the server: who may import whom, and that nobody else pays for them."""

from __future__ import annotations

import pytest

from tests.unit.test_layers import MODULES, TREES, imports, loaded_by, ours, outside, within

ORDER = [
    {"app", "demo", "processes"},
    {"http", "grpc"},
    {"inference", "metrics"},
    {"repository", "shm", "auth"},
    {"interfaces"},
    {"options"},
    {"v2", "shielded"},
]
"""From top to bottom.  A package imports itself and what is below it."""
SERVER = sorted(name.removeprefix("server.") for name in MODULES if name.startswith("server."))


def used(name: str) -> set[str]:
    """Modules of the server that one of them imports."""
    found = {ours(imported) for imported in imports(f"server.{name}")}
    return {module.removeprefix("server.") for module in found if module and module.startswith("server.")}


def rank(name: str) -> int:
    (at,) = [at for at, names in enumerate(ORDER) if name.split(".")[0] in names]
    return at


@pytest.mark.parametrize("name", SERVER)
def test_imports_run_downward(name: str) -> None:
    own = name.split(".")[0]
    others = {other for other in used(name) if other.split(".")[0] != own}
    if own in ORDER[0]:  # the program itself
        others = {other for other in others if other.split(".")[0] not in ORDER[0]}
    assert not {other for other in others if rank(other) <= rank(name)}


def test_everything_in_the_server_has_a_rank() -> None:
    assert {name.split(".")[0] for name in SERVER} == set().union(*ORDER)


@pytest.mark.parametrize("library", ["starlette", "httptools", "grpc", "google", "uvloop"])
def test_only_the_server_needs_the_extra(library: str) -> None:
    users = {name for name in TREES if library in outside(name)}
    assert users and all(within(name, {"server"}) for name in users)


def test_nobody_loads_the_server_who_does_not_serve() -> None:
    assert not loaded_by("import onnx_dl; onnx_dl.ModelHost; onnx_dl.InferenceSessionProxy") & {
        "starlette",
        "httptools",
        "grpc",
        "google",
        "uvloop",
    }
