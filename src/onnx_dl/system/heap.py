"""The heap of this process: gives its free pages back to the system."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable


def _find_trim() -> Callable[[ctypes.c_size_t], object] | None:
    """glibc's ``malloc_trim``; None: another C library, which has none."""
    with contextlib.suppress(TypeError, OSError):  # Windows opens no library without a name
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None


_trim = _find_trim()


def trim_heap() -> None:
    """Returns the free pages of the heap to the system.

    Parsing and prepacking a model leave a quarter to more than half of its size in free pages, which the heap
    would keep.  Takes about ten milliseconds for a model of 200 MB: too long to do after each call.
    """
    if _trim is not None:
        _trim(ctypes.c_size_t(0))
