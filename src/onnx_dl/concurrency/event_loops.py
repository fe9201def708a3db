"""Finds the library that runs the present coroutine, and defines the operations that are needed of it.

The libraries are asyncio (also with uvloop) and trio; anyio runs on one of the two.  None is imported before
it runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from onnx_dl.concurrency.forking import importing
from onnx_dl.errors import ConfigError

_T = TypeVar("_T")


class EventLoops(Protocol):
    """Operations of one library, for coroutines that run on its event loops."""

    cancelled: type[BaseException]
    """Exception in a coroutine that is cancelled."""

    def key(self) -> object:
        """An object that stands for the present loop and lives as long as it."""

    async def readable(self, fd: int) -> None:
        """Waits until a descriptor is readable."""

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Runs ``work`` in a thread.  A coroutine that is cancelled does not wait for its end."""

    def aside(self, work: Callable[[], object]) -> None:
        """Runs brief ``work`` in a thread without waiting.  Raises RuntimeError at the interpreter's end, and
        ProcessesExhausted if there is no thread."""

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[object]:
        """A block that is cancelled after ``seconds``, and then raises TimeoutError."""

    def semaphore(self, value: int) -> AbstractAsyncContextManager[object]:
        """A block that ``value`` coroutines may be in at a time."""


def present() -> EventLoops:
    """The library that runs the present coroutine; raises ConfigError if it is neither asyncio nor trio."""
    if "trio" in sys.modules and _is_on_trio():
        return _of("trio")
    try:
        sys.modules["asyncio"].get_running_loop()
    except (KeyError, RuntimeError):
        raise ConfigError(
            "This coroutine runs on neither asyncio nor trio. Await it on one of these (anyio runs on both), "
            "or call run() or load() in a thread."
        ) from None
    return _of("asyncio")


def _is_on_trio() -> bool:
    if (sniffio := sys.modules.get("sniffio")) is None:
        return bool(sys.modules["trio"].lowlevel.in_trio_task())
    try:  # asyncio may run on trio, and the other way round
        return bool(sniffio.current_async_library() == "trio")
    except sniffio.AsyncLibraryNotFoundError:
        return False


@functools.cache
def _of(library: str) -> EventLoops:
    loops: EventLoops = importing(f"onnx_dl.concurrency.on_{library}").LOOPS
    return loops
