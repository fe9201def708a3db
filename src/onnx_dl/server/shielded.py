"""Work that goes on when the coroutine that awaits it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

_T = TypeVar("_T")

_under_way: Final[set[asyncio.Future[Any]]] = set()
"""All such work, because an event loop does not keep it: a task that nobody else refers to may be lost."""


async def shielded(work: asyncio.Future[_T] | Coroutine[Any, Any, _T]) -> _T:
    """Await work, which is not cancelled with its caller.

    It is kept until it is done.  Nobody is told of its failure if its caller has gone by then:
    ``asyncio.shield`` would have the loop report that.
    """
    future = asyncio.ensure_future(work)
    _under_way.add(future)
    future.add_done_callback(_end)
    await asyncio.wait([future])
    return future.result()


def _end(future: asyncio.Future[Any]) -> None:
    _under_way.discard(future)
    if not future.cancelled():
        future.exception()  # so it counts as seen
