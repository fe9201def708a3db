"""Fixtures that tests of sessions share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support import fake_cuda
from tests.support.slow import late_model


@pytest.fixture(params=["copy", "map"])
def is_mapped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "map")


@pytest.fixture
def late(module_host: ModelHost) -> Iterator[InferenceSessionProxy]:
    with InferenceSessionProxy(late_model(), host=module_host) as session:
        yield session


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the stand-in for CUDA's driver."""
    made = tmp_path_factory.mktemp("fake_cuda")
    fake_cuda.build(made)
    return made
