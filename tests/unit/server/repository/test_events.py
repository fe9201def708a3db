"""The host's events in the loop: what they mark, and the end of the marks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.server.interfaces import Served
from onnx_dl.server.repository import events as module
from onnx_dl.server.repository import health as marks
from onnx_dl.server.repository.events import Events
from onnx_dl.server.repository.health import Health
from onnx_dl.server.repository.tasks import Tasks
from tests.support.waiting import DEADLINE, allowed

ENTRY = Served(name="m", version="1", path="/m/1/model.onnx", generation="1a")
FAILED = ModelEvent(
    seq=1, type=EventType.FAILED, at=0.0, model="m", key="1a", worker_id=1, detail="no processes"
)


class Tables:
    """Tables that have one entry, and note at each publication what is failing."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self.published: asyncio.Queue[int] = asyncio.Queue()

    def all(self) -> list[Served]:
        return [ENTRY]

    async def publish(self) -> None:
        self.published.put_nowait(len(self._health.failing))


def test_a_mark_ends_though_the_loops_timer_is_a_moment_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of uvloop may be: a clock that stands still has not reached the mark's end either."""
    monkeypatch.setattr(marks, "_AFTER", 0.01)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    told: list[Callable[[ModelEvent], None]] = []

    def follow(call: Callable[[ModelEvent], None]) -> Callable[[], None]:
        told.append(call)
        return told.clear

    async def run() -> None:
        health = Health()
        tables: Any = Tables(health)
        events = Events(health, tables, Tasks())
        host: Any = SimpleNamespace(on_event=follow)
        events.follow(host)
        told[0](FAILED)
        async with asyncio.timeout(allowed(DEADLINE)):
            assert [await tables.published.get() for _ in range(2)] == [1, 0]
        events.close()
        assert not told

    asyncio.run(run())
