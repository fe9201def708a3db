"""The children of a server, with stand-ins for their processes: counts, deaths, replacements, the drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.inference.statistics import merged
from onnx_dl.server.interfaces import DurationCount, RegionStatus, VersionStatistics
from onnx_dl.server.processes import children as module
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.child_process import ChildGone
from onnx_dl.server.processes.children import Children
from onnx_dl.server.shm.regions import Regions
from tests.support.waiting import DEADLINE, allowed

PAUSE = 0.05
"""Seconds for which a child that ended early is not replaced."""


def counts(number: int) -> list[VersionStatistics]:
    return [
        VersionStatistics(
            name="m", version="1", inference_count=number, success=DurationCount(number, number), pending=1
        )
    ]


class Child:
    """A child's process.  It listens at once, unless ``listening`` is false."""

    listening = True
    started: list[Child]

    def __init__(self, row: int, _answer: Any, ended: Callable[[Any], None]) -> None:
        self.row = row
        self.pid = len(self.started)
        self.age = 0.0
        self.statistics: list[VersionStatistics] = []
        self.messages: list[msgspec.Struct] = []
        self.listens: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.listens.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.asked, self.may_answer, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._on_ended = ended
        self.started.append(self)
        if self.listening:
            self.listens.set_result(None)

    @property
    def is_listening(self) -> bool:
        return self.listens.done() and self.listens.exception() is None

    def tell(self, message: msgspec.Struct, fds: Any = ()) -> None:
        self.messages.append(message)

    async def count(self) -> None:
        self.asked.set()
        await self.may_answer.wait()

    def kill(self) -> None:
        if not self.gone.is_set():
            self.gone.set()
            self.may_answer.set()
            if not self.listens.done():
                self.listens.set_exception(ChildGone("It has ended."))
            self._on_ended(self)

    async def ended(self, seconds: float) -> None:
        await asyncio.sleep(0)


def begin(row: int) -> m.Begin:
    return SimpleNamespace(row=row)  # type: ignore[return-value]


def run(test: Callable[[Children], Coroutine[Any, Any, None]], count: int, **more: Any) -> None:
    """Runs a test with so many children."""

    async def whole() -> None:
        children = Children(Limits(rows=count + 1), 0)
        async with asyncio.timeout(allowed(DEADLINE)):
            first = more.pop("begin", begin)
            await children.start(count, first, None, more.pop("regions", Regions("off")))  # type: ignore[arg-type]
            try:
                await test(children)
            finally:
                await children.close()

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """Children that were started, in order."""
    found: list[Child] = []
    monkeypatch.setattr(Child, "started", found, raising=False)
    monkeypatch.setattr(module, "ChildProcess", Child)
    monkeypatch.setattr(module, "_LEAST_LIFE", PAUSE)
    return found


def test_counts_of_a_child_that_dies_while_it_is_asked_are_there_once(started: list[Child]) -> None:
    async def test(children: Children) -> None:
        dying, other = started
        dying.statistics, other.statistics = counts(3), counts(4)
        asked = asyncio.ensure_future(children.statistics())
        await dying.asked.wait()
        await other.asked.wait()
        dying.kill()
        other.statistics = counts(5)
        other.may_answer.set()
        (total,) = merged(await asked)
        assert (total.inference_count, total.success.count, total.pending) == (8, 8, 1)
        (later,) = merged(await children.statistics())
        assert later.inference_count == 8

    run(test, 2)


def test_a_child_that_ends_early_is_replaced_after_a_pause(started: list[Child]) -> None:
    async def test(children: Children) -> None:
        started[0].kill()
        assert children.pids == []
        await until(lambda: children.pids == [1])
        assert [each.row for each in started] == [1, 1]

    run(test, 1)


def test_a_drain_during_the_pause_starts_nobody(
    started: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(children: Children) -> None:
        monkeypatch.setattr(module, "_LEAST_LIFE", 10 * PAUSE)  # the drain is sooner
        started[0].kill()
        replacing = [each for each in children._tasks if "_replace" in repr(each)]
        for _ in range(5):  # it sleeps then
            await asyncio.sleep(0)
        await children.drain(1.0)
        await asyncio.wait(replacing)
        assert len(replacing) == 1 and len(started) == 1

    run(test, 1)


def test_a_replacement_that_does_not_listen_is_replaced(
    started: list[Child], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(children: Children) -> None:
        monkeypatch.setattr(module, "_START_TIMEOUT", 10 * PAUSE)  # until() looks sooner
        monkeypatch.setattr(Child, "listening", False)
        started[0].kill()
        await until(lambda: len(started) == 2)
        assert not started[1].gone.is_set()
        await started[1].gone.wait()
        monkeypatch.setattr(Child, "listening", True)
        await until(lambda: len(started) >= 3 and started[-1].is_listening)
        assert children.pids == [started[-1].pid]

    run(test, 1)
    assert "did not listen in time" in caplog.text


def test_a_replacement_that_ends_before_it_listens_has_one_successor(
    started: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(children: Children) -> None:
        monkeypatch.setattr(Child, "listening", False)
        started[0].kill()
        await until(lambda: len(started) == 2)
        monkeypatch.setattr(Child, "listening", True)
        started[1].kill()
        await until(lambda: len(started) == 3)
        await asyncio.sleep(2 * PAUSE)
        assert len(started) == 3 and children.pids == [2]

    run(test, 1)


def test_a_child_that_cannot_be_told_what_to_do_is_ended_and_replaced(
    started: list[Child], caplog: pytest.LogCaptureFixture
) -> None:
    """A replacement must have all regions: it would answer 404 for those that it lacks."""
    failures = [OSError(24, "Too many open files")]

    class Descriptors:
        """Regions of which the first cannot be given away once."""

        def status(self, _: str | None) -> list[RegionStatus]:
            return [RegionStatus("r", "/k", 0, 1)] if len(started) > 1 else []

        def find(self, _: str) -> Any:
            return SimpleNamespace(memory=self)

        def duplicate(self) -> int:
            if failures:
                raise failures.pop()
            with open("/dev/null") as file:
                return module.os.dup(file.fileno())

    async def test(children: Children) -> None:
        started[0].kill()
        await until(lambda: len(started) == 3)
        assert started[1].gone.is_set()
        assert children.pids == [2]
        assert [type(each).__name__ for each in started[2].messages] == ["SimpleNamespace", "UseRegion"]

    with caplog.at_level(logging.ERROR):
        run(test, 1, regions=Descriptors())
    assert "Too many open files" in caplog.text
