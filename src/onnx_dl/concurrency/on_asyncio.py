"""Operations of asyncio for awaited calls.  Imported only where asyncio runs, because that takes 50 ms."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from onnx_dl.concurrency.errands import ABORTS
from onnx_dl.concurrency.event_loops import EventLoops

_T = TypeVar("_T")


class _Asyncio:
    cancelled: type[BaseException] = asyncio.CancelledError

    def key(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def readable(self, fd: int) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(fd)

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.to_thread(work)

    def aside(self, work: Callable[[], object]) -> None:
        ABORTS.add(work)

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        return asyncio.timeout(seconds)

    def semaphore(self, value: int) -> asyncio.Semaphore:
        return asyncio.Semaphore(value)


LOOPS: Final[EventLoops] = _Asyncio()
