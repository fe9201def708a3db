"""The event loop of a process of a server: uvloop's, where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine


def run(work: Coroutine[None, None, int]) -> int:
    """Runs a coroutine in a new loop, and returns its result."""
    with asyncio.Runner(loop_factory=_factory()) as runner:
        return runner.run(work)


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop
    return None
