"""The event loop of a process of a server: uvloop's, where it is installed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Coroutine
from typing import Final

_THREADS: Final = 32
"""Threads for short work of the loop: bodies that are compressed, questions to the host.  asyncio's own
number follows the cores, and is 6 on a machine of two."""


def run(work: Coroutine[None, None, int]) -> int:
    """Runs a coroutine in a new loop, and returns its result."""
    with asyncio.Runner(loop_factory=_factory()) as runner:
        threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "onnx-dl-short")
        runner.get_loop().set_default_executor(threads)
        return runner.run(work)


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None
