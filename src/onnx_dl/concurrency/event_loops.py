"""Which library runs the present coroutine, and what calls that are awaited need of it.

asyncio (and uvloop, which is asyncio's) and trio; anyio runs on one of the two.  Neither is imported before
it runs, and none is needed to find out which does.  What is awaited is :mod:`onnx_dl.client.awaited_calls`'s.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from onnx_dl.concurrency.forking import importing
from onnx_dl.errors import ConfigError

_T = TypeVar("_T")


class EventLoops(Protocol):
    """The event loops of one library.  Its methods are for coroutines that run on one."""

    cancelled: type[BaseException]
    """What is raised in a coroutine that is cancelled."""

    def key(self) -> Any:
        """Tells loops apart, and lives as long as the loop."""

    async def readable(self, fd: int) -> None:
        """Waits until a descriptor is readable."""

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns in a thread.  If the coroutine is cancelled, it does not wait for that."""

    def aside(self, work: Callable[[], object]) -> None:
        """Has a thread do it; nobody waits.

        Raises:
            RuntimeError: the loop's threads have ended.
        """

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """A block that is cancelled after so many seconds, and raises TimeoutError then."""

    def semaphore(self, value: int) -> AbstractAsyncContextManager[Any]:
        """To be entered by so many coroutines at a time."""


def present() -> EventLoops:
    """Those of the library that runs the present coroutine.

    Raises:
        ConfigError: it is neither asyncio nor trio.
    """
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
