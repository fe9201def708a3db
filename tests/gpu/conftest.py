"""Tests that need an NVIDIA GPU: ``pytest -m gpu``.  ``-n 0`` has the device's memory measured, too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks.gpu import machine

from tests.support.gpu import CASES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skips where there is none.  It comes before the tests count what they leave: CUDA stays."""
    if (why := machine.why_not(CASES["tiny"].model)) is not None:
        pytest.skip(why)


@pytest.fixture
def alone() -> None:
    """Skips where other tests use the device meanwhile."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("other tests use the GPU meanwhile: run `pytest -m gpu -n 0`")
