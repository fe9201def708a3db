"""Fixtures: a small model in a file, and a proxy of it in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.slow import identity_model

Open = Callable[..., InferenceSessionProxy]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """y = x, a file of its own."""
    file = tmp_path / "identity.onnx"
    file.write_bytes(identity_model())
    return str(file)


@pytest.fixture
def here(host: ModelHost) -> Open:
    """Opens proxies whose models run in this process."""
    return lambda model, **terms: host.open(model, isolation=False, **terms)
