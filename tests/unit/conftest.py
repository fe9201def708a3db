"""Pure tests leave nothing behind either; counted once per file, because there are a thousand of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.conftest import _belongings, _left


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_behind() -> Iterator[None]:
    before = _belongings()
    yield
    gc.collect()
    assert not _left(before)
