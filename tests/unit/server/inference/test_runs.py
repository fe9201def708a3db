"""Both tries of an awaited run share one deadline."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.inference import runs
from onnx_dl.session import placed_runs, short_runs


def test_a_second_try_has_what_the_first_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float | None] = []

    async def not_executed(proxy: object, names: object, feed: object, deadline: Deadline, _: object) -> None:
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            await asyncio.sleep(0)
        left.append(deadline.left())

    async def usual(proxy: object, names: object, feed: object, places: object, timeout: float) -> list[Any]:
        left.append(timeout)
        return []

    monkeypatch.setattr(short_runs, "arun", not_executed)
    monkeypatch.setattr(placed_runs, "arun", usual)
    prepared: Any = SimpleNamespace(
        types={}, names=["y"], feed={}, places={}, signature=SimpleNamespace(patience=None)
    )
    asyncio.run(runs.arun(None, prepared, 5.0, None))  # type: ignore[arg-type]
    first, second = left
    assert first is not None and second is not None and second <= first <= 4.9
