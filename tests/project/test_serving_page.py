"""docs/serving.md has each call of the server, with a test that is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("tritonclient.http")
pytest.importorskip("tritonclient.grpc")

from onnx_dl.server.grpc.messages import POOL
from onnx_dl.server.http.targets import ROUTES
from tests.server.conformance.steps import STEPS

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "server"


class Call(NamedTuple):
    """One row of the table."""

    http: set[str]
    grpc: set[str]
    tests: set[str]


def _names(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def _table() -> list[Call]:
    text = (ROOT / "docs" / "serving.md").read_text()
    after = text.split("| call | HTTP | gRPC | test |\n|---|---|---|---|\n")[1]
    rows = [line.split("|")[2:5] for line in after.split("\n\n")[0].splitlines()]
    return [Call(*map(_names, row)) for row in rows]


CALLS = _table()


def test_the_page_has_the_paths_that_are_served() -> None:
    served = {f"{'GET' if 'GET' in route.operations else 'POST'} {route.template}" for route in ROUTES}
    assert set().union(*(call.http for call in CALLS)) == served


def test_the_page_has_the_calls_of_grpc() -> None:
    services = ("inference.GRPCInferenceService", "grpc.health.v1.Health")
    served = {method.name for name in services for method in POOL.FindServiceByName(name).methods}
    assert set().union(*(call.grpc for call in CALLS)) == served


def test_each_call_has_a_test_that_is_there() -> None:
    for call in CALLS:
        assert call.tests, call
        for name in call.tests:
            file, _, function = name.partition("::")
            if function:
                assert re.search(rf"^def {function}\(", (TESTS / file).read_text(), re.MULTILINE), name
            else:
                assert name in STEPS, name
