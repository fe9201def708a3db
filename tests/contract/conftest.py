"""Fixtures: each test of this folder runs on both classes."""

from __future__ import annotations

import pytest

from onnx_dl import ModelHost
from tests.contract.both import KINDS, Make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two classes."""
    return request.param


@pytest.fixture
def make(kind: str, module_host: ModelHost, nothing_is_left_behind: None) -> Make:
    """A factory of sessions: ``make(source, sess_options=None, providers=CPU, **kw)``."""
    return Make(kind, module_host if kind == "proxy" else None)
