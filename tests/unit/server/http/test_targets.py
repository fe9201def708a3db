from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_dl.server.http.targets import ROUTES, find_target
from onnx_dl.server.v2.operations import Operation, Scope


def found(target: bytes, method: str = "GET") -> tuple[Operation | None, dict[str, str]] | None:
    target_ = find_target(target)
    return None if target_ is None else (target_.route.operations.get(method), target_.names)


@pytest.mark.parametrize(
    ("target", "method", "operation", "names"),
    [
        (b"/v2/health/live", "GET", Operation.SERVER_LIVE, {}),
        (b"/v2/health/ready?x=/y", "HEAD", Operation.SERVER_READY, {}),
        (b"http://localhost:8000/v2", "GET", Operation.SERVER_METADATA, {}),
        (b"HTTPS://[::1]:8000/v2/models/m", "GET", Operation.MODEL_METADATA, {"model": "m"}),
        (b"/v2/models/a%20b/ready", "GET", Operation.MODEL_READY, {"model": "a b"}),
        (b"/v2/models/%c3%a4/versions/2/infer", "POST", Operation.INFER, {"model": "ä", "version": "2"}),
        (b"/v2/models/stats", "GET", Operation.STATISTICS, {}),
        (b"/v2/models/m/versions/1/stats", "GET", Operation.STATISTICS, {"model": "m", "version": "1"}),
        (b"/v2/repository/models/m/load", "POST", Operation.REPOSITORY_LOAD, {"model": "m"}),
        (b"/v2/repository/models/m/load", "GET", None, {"model": "m"}),
        (b"/v2/systemsharedmemory/region/r/register", "POST", Operation.SHM_REGISTER, {"region": "r"}),
        (b"/v2/cudasharedmemory/unregister", "POST", Operation.SHM_UNREGISTER, {}),
        (b"/v2/logging", "POST", Operation.SETTINGS, {}),
        (b"/metrics", "GET", Operation.METRICS, {}),
        (b"/metrics", "POST", None, {}),
    ],
)
def test_a_path_is_an_operation(
    target: bytes, method: str, operation: Operation | None, names: dict[str, str]
) -> None:
    assert found(target, method) == (operation, names)


@pytest.mark.parametrize(
    "target",
    [
        b"/", b"*", b"", b"/v2/", b"//v2", b"/v1/models/m:predict", b"/v2/models//infer", b"/v2/models/m/",
        b"/v2/models/a%2Fload", b"/v2/repository%2Findex", b"/v2/models/%ff", b"/v2/models/a%00b",
        b"ftp://x/v2", b"localhost:8000", b"/v2/../metrics", b"/V2", b"/v2/models/m/generate",
    ],
)  # fmt: skip
def test_other_paths_are_not_served(target: bytes) -> None:
    assert found(target) is None


def test_only_health_is_open_to_all() -> None:
    opened = {
        route.template
        for route in ROUTES
        if any(operation.scope is Scope.HEALTH for operation in route.operations.values())
    }
    assert opened == {
        "/v2/health/live", "/v2/health/ready", "/v2/models/{model}/ready",
        "/v2/models/{model}/versions/{version}/ready",
    }  # fmt: skip


def test_every_operation_has_a_path() -> None:
    assert {operation for route in ROUTES for operation in route.operations.values()} == set(Operation)


@given(st.binary(max_size=700).filter(lambda target: b" " not in target))
def test_any_target_is_found_or_not(target: bytes) -> None:
    assert find_target(target) == find_target(target)
