"""Threads for what may block for many seconds."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Final, TypeVar

_MOST: Final = 64
"""Waits at a time; further ones begin when these end."""

_Result = TypeVar("_Result")


class _Waits:
    """Calls that block, in threads that end when none is left.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._count = 0

    def begin(self, wait: Callable[..., _Result], *args: object) -> concurrent.futures.Future[_Result]:
        """Calls ``wait`` in a thread."""
        with self._lock:
            if self._threads is None:
                self._threads = concurrent.futures.ThreadPoolExecutor(_MOST, "onnx-dl-wait")
            future = self._threads.submit(wait, *args)
            self._count += 1
        future.add_done_callback(self._end)
        return future

    def _end(self, _: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count and self._threads is not None:
                self._threads.shutdown(wait=False)
                self._threads = None


_waits: Final = _Waits()


async def wait_in_thread(wait: Callable[..., _Result], *args: object) -> _Result:
    """Awaits a call that blocks, in a thread that is not the loop's: for those, requests wait."""
    return await asyncio.wrap_future(_waits.begin(wait, *args))
