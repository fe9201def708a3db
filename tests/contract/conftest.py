"""Fixtures: each test of this folder runs on both classes."""

from __future__ import annotations

import pytest

from onnx_dl import ModelHost
from tests.contract.both import KINDS, Make
from tests.contract.older import is_otherwise


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two classes."""
    return request.param


@pytest.fixture
def make(kind: str, module_host: ModelHost, nothing_is_left_behind: None) -> Make:
    """A factory of sessions: ``make(source, sess_options=None, providers=CPU, **kw)``."""
    return Make(kind, None if kind == "onnxruntime" else module_host)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what the installed versions do otherwise themselves."""
    for item in items:
        if item.path.parent.name == "contract" and is_otherwise(item.path.stem, item.name):
            item.add_marker(pytest.mark.skip("this version of onnxruntime or numpy does it otherwise itself"))
