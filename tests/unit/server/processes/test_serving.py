"""A signal while a server starts, and the end of its parts, with stand-ins for all that takes time."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from onnx_dl.server import app
from onnx_dl.server.inference.heap import LARGE
from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.processes.front import Addresses, Front
from tests.support.waiting import DEADLINE, allowed


class Parts:
    """Listeners, children, host and repository of a server whose models load for ever."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.waits_at = ""
        self.waiting = asyncio.Event()

    async def _step(self, name: str) -> None:
        self.steps.append(name)
        if name == self.waits_at:
            self.waiting.set()
            await asyncio.Event().wait()

    def listeners(self) -> Any:
        async def start(*_: Any, **__: Any) -> Addresses:
            await self._step("listen")
            return Addresses("h", "g")

        return SimpleNamespace(
            start=start, drain=lambda _: self._step("drain listeners"), close=lambda: self._step("close")
        )

    def children(self, *_: Any) -> Any:
        return SimpleNamespace(
            start=lambda *_: self._step("start children"),
            drain=lambda _: self._step("drain children"),
            close=lambda: self._step("close"),
        )

    def repository(self, *_: Any) -> Any:
        return SimpleNamespace(
            start=lambda: self._step("start repository"),
            has_started=SimpleNamespace(wait=lambda: self._step("load")),
            close=lambda: self._step("close"),
        )


@pytest.mark.parametrize(
    ("waits_at", "drains"),
    [("listen", False), ("start repository", True), ("start children", True), ("load", True)],
)
def test_a_signal_during_the_start_drains_what_is_served(
    waits_at: str, drains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        parts = Parts()
        parts.waits_at = waits_at
        host = SimpleNamespace(name="n", snapshot=lambda: SimpleNamespace(memory_limit=1 << 30))

        async def open_host(_: Any) -> Any:
            return host

        monkeypatch.setattr(app, "Listeners", parts.listeners)
        monkeypatch.setattr(app, "Children", parts.children)
        monkeypatch.setattr(app, "Repository", parts.repository)
        monkeypatch.setattr(app, "_end_later", lambda _: parts.steps.append("end later"))
        monkeypatch.setattr(app, "keep_host", lambda _: parts._step("keep"))
        monkeypatch.setattr(app._Serving, "_open_host", open_host)
        served = asyncio.ensure_future(app._Serving(ServeOptions(), None).serve())  # type: ignore[arg-type]
        async with asyncio.timeout(allowed(DEADLINE)):
            await parts.waiting.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await served == 0
        assert ("drain listeners" in parts.steps, "drain children" in parts.steps) == (drains, drains)
        assert parts.steps[-3:] == ["close"] * 3

    asyncio.run(test())


def test_the_end_of_the_parts_ends_their_threads() -> None:
    before = set(threading.enumerate())
    front = Front(ServeOptions(), object(), Limits(), None)  # type: ignore[arg-type]
    front.inference.note_size(LARGE)
    assert [each.name for each in set(threading.enumerate()) - before] == ["onnx-dl-heap"]
    front.close()
    assert set(threading.enumerate()) <= before
