"""What keeps a live worker's private memory near that of its model.

Covers the heap after a load, and the pages that a forked worker shares with the template.  What ends when the
process ends is not looked after here.  docs/performance.md has what was measured and what was not kept.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

_trim: Callable[[ctypes.c_size_t], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's; other C libraries have none."""


def trim() -> None:
    """Gives the free pages of the heap back to the system.

    Once a model is loaded: parsing and prepacking it leave a quarter to more than half of its size in free
    pages, which the heap would keep.  Takes about ten milliseconds for a model of 200 MB, so it is not for
    every call.
    """
    if _trim is not None:
        _trim(ctypes.c_size_t(0))


def share() -> None:
    """In a process that will be forked: keeps its children's garbage collector away from what is there now.

    A collection writes into the header of each object that it looks at, so in a child it would turn all
    these shared pages into private copies.
    """
    gc.collect()
    gc.freeze()
