"""What calls that are awaited need of trio.  Tried with 0.35.  Imported where that runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar

import trio  # type: ignore[import-not-found, unused-ignore]

from onnx_dl.concurrency.event_loops import EventLoops

_T = TypeVar("_T")


class _Trio:
    cancelled: type[BaseException] = trio.Cancelled

    def key(self) -> Any:
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

    def semaphore(self, value: int) -> Any:
        return trio.Semaphore(value)


LOOPS: Final[EventLoops] = _Trio()
