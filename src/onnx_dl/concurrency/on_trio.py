"""Operations of trio for awaited calls.  Imported only where trio runs.  Tested with 0.35."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

import trio  # type: ignore[import-not-found, unused-ignore]

from onnx_dl.concurrency.event_loops import EventLoops

_T = TypeVar("_T")


class _Trio:
    cancelled: type[BaseException] = trio.Cancelled

    def key(self) -> object:
        return trio.lowlevel.current_trio_token()

    async def readable(self, fd: int) -> None:
        await trio.lowlevel.wait_readable(fd)

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        result: _T = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
        return result

    def aside(self, work: Callable[[], object]) -> None:
        trio.lowlevel.start_thread_soon(work, lambda outcome: None)

    @contextlib.asynccontextmanager
    async def timeout(self, seconds: float | None) -> AsyncIterator[None]:
        with trio.move_on_after(math.inf if seconds is None else seconds) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError

    def semaphore(self, value: int) -> contextlib.AbstractAsyncContextManager[object]:
        made: contextlib.AbstractAsyncContextManager[object] = trio.Semaphore(value)
        return made


LOOPS: Final[EventLoops] = _Trio()
