"""Measures that keep a worker's private memory near the size of its model.

Covers the heap after a load, and the pages that a forked worker shares with the template.
docs/performance.md has the measurements, and what was tried and not kept.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

_trim: Callable[[ctypes.c_size_t], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Exists in glibc only."""


def trim() -> None:
    """Returns the free pages of the heap to the system.

    Parsing and prepacking a model leave a quarter to more than half of its size in free pages, which the heap
    would keep.  Takes about ten milliseconds for a model of 200 MB: too long to do after each call.
    """
    if _trim is not None:
        _trim(ctypes.c_size_t(0))


def share() -> None:
    """Exempts all present objects from garbage collection, in a process that is about to be forked.

    A collection writes into each object's header, which in a child makes shared pages private copies.
    """
    gc.collect()
    gc.freeze()
