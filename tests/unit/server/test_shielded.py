"""Work that outlives those who await it, and is heard of by nobody else."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from onnx_dl.server.shielded import shielded
from tests.support.waiting import DEADLINE, allowed


def reports_of(test: Callable[[], Coroutine[Any, Any, None]]) -> list[dict[str, Any]]:
    """What the loop had to report of a test."""
    reports: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
        async with asyncio.timeout(allowed(DEADLINE)):
            await test()
        gc.collect()  # a failure that nobody has seen is reported when its future goes

    asyncio.run(watched())
    gc.collect()
    return reports


async def left_by_its_waiter(work: asyncio.Future[int]) -> None:
    """Has a task await the work, and cancels that."""
    waiter = asyncio.ensure_future(shielded(work))
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait([waiter])
    assert waiter.cancelled() and not work.done()


def test_a_failure_that_nobody_awaits_is_not_reported() -> None:
    async def test() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        await left_by_its_waiter(work)
        work.set_exception(OSError())
        await asyncio.wait([work])

    assert not reports_of(test)


def test_work_that_nobody_refers_to_is_done() -> None:
    """The task, the future that it waits for and what would wake it are garbage but for their keeper."""

    class Source:
        """Something that only the work refers to."""

        def __init__(self) -> None:
            self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    made: list[weakref.ref[Source]] = []
    done = asyncio.Event()

    async def work() -> None:
        source = Source()
        made.append(weakref.ref(source))
        await source.ready
        done.set()

    async def test() -> None:
        waiter = asyncio.ensure_future(shielded(work()))
        while not made:
            await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait([waiter])
        del waiter
        gc.collect()
        source = made[0]()
        assert source is not None, "the work was lost"
        source.ready.set_result(None)
        await done.wait()

    assert not reports_of(test)


def test_who_awaits_it_gets_its_result_or_failure() -> None:
    async def result() -> int:
        await asyncio.sleep(0)
        return 3

    async def failure() -> int:
        raise KeyError("x")

    async def test() -> None:
        assert await shielded(result()) == 3
        task = asyncio.ensure_future(result())
        assert await asyncio.gather(shielded(task), shielded(task)) == [3, 3]
        assert await shielded(task) == 3, "it was done before"
        for _ in range(2):
            with pytest.raises(KeyError):
                await shielded(failure())

    assert not reports_of(test)


def test_work_that_is_cancelled_cancels_who_awaits_it() -> None:
    async def test() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiter = asyncio.ensure_future(shielded(work))
        await asyncio.sleep(0)
        work.cancel()
        await asyncio.wait([waiter])
        assert waiter.cancelled()

    assert not reports_of(test)


def test_others_go_on_waiting_when_one_has_gone() -> None:
    async def test() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        other = asyncio.ensure_future(shielded(work))
        await left_by_its_waiter(work)
        work.set_result(5)
        assert await other == 5

    assert not reports_of(test)
