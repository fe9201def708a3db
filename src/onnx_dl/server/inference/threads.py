"""Threads for steps of inferences in which an event loop would be kept waiting.

They are none of the loop's own: those may all be held by other work when these steps are needed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable
from typing import Final, TypeVar

from onnx_dl.client.awaited_calls import deadline_of
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.shielded import shielded

_T = TypeVar("_T")

_STEPS: Final = 4
"""Requests and results that are converted at a time: Python's own work gets no quicker by more."""
_RUNS: Final = 64
"""Runs that a thread waits for."""


class Threads:
    """The threads.  They start when they are needed."""

    def __init__(self) -> None:
        self._steps = concurrent.futures.ThreadPoolExecutor(_STEPS, "onnx-dl-step")
        self._runs = concurrent.futures.ThreadPoolExecutor(_RUNS, "onnx-dl-run")

    async def step(self, work: Callable[[], _T]) -> _T:
        """Await ``work``.  Once begun, it is awaited even if the coroutine is cancelled: the caller's end
        takes away what it uses."""
        begun = self._steps.submit(work)
        awaited = asyncio.wrap_future(begun)
        try:
            return await shielded(awaited)
        except asyncio.CancelledError:
            begun.cancel()
            while not awaited.done():
                try:
                    await asyncio.wait([awaited])
                except asyncio.CancelledError:  # once more, when the loop ends
                    continue
            raise

    async def run(self, work: Callable[[Deadline], _T], timeout: float | None) -> _T:
        """Await a run, with a deadline that passes when this coroutine is cancelled."""
        with deadline_of(timeout) as deadline:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(timeout):
                return await loop.run_in_executor(self._runs, functools.partial(work, deadline))

    def close(self) -> None:
        """End the threads when their work ends."""
        for threads in (self._steps, self._runs):
            threads.shutdown(wait=False, cancel_futures=True)
