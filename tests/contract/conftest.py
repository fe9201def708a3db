"""Fixtures: each test of this folder runs on both classes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onnx_dl import ModelHost
from tests.contract.both import KINDS, Make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two classes."""
    return request.param


@pytest.fixture(scope="module")
def module_host() -> Iterator[ModelHost]:
    """The host of a file's tests.  It runs before they count what they leave: each of them has its own
    sessions."""
    with ModelHost() as host:
        host.start()
        yield host


@pytest.fixture
def make(kind: str, module_host: ModelHost, nothing_is_left_behind: None) -> Make:
    """A factory of sessions: ``make(source, sess_options=None, providers=CPU, **kw)``."""
    return Make(kind, module_host if kind == "proxy" else None)
