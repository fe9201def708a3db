"""Fixtures of the tests with memory of a third process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.slow import late_model


@pytest.fixture(params=["copy", "map"])
def is_mapped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "map")


@pytest.fixture
def late(module_host: ModelHost) -> Iterator[InferenceSessionProxy]:
    with InferenceSessionProxy(late_model(), host=module_host) as session:
        yield session
