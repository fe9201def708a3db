"""Loads that coroutines wait for: one thread for each model, however many wait."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from typing import Final

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.shielded import shielded
from onnx_dl.session import placed_runs
from onnx_dl.session.inference_session import InferenceSessionProxy

_MOST: Final = 256
"""Models that are loaded at a time for waiting coroutines."""


class Loads:
    """The loads that are under way.  Thread-safe: each event loop has its own."""

    def __init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(_MOST, "onnx-dl-load")
        self._under_way: dict[int, concurrent.futures.Future[None]] = {}
        """Loads by ``id`` of the proxy, which they keep."""

    async def wait(self, proxy: InferenceSessionProxy, timeout: float | None) -> None:
        """Have the model loaded; a load goes on without those that wait for it.

        Raises:
            TimeoutError: ``timeout`` seconds passed.
            Exception: like the model's first call.
        """
        key = id(proxy)
        if (load := self._under_way.get(key)) is None:
            load = self._threads.submit(placed_runs.bind, proxy, Deadline(None))
            self._under_way[key] = load
            load.add_done_callback(functools.partial(self._end, key))
        async with asyncio.timeout(timeout):
            await shielded(asyncio.wrap_future(load))

    def _end(self, key: int, load: concurrent.futures.Future[None]) -> None:
        if self._under_way.get(key) is load:
            del self._under_way[key]

    def close(self) -> None:
        """End the threads when their loads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
