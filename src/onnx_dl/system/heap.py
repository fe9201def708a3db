"""The heap of this process: gives its free pages back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from onnx_dl import linux_only

_trim: Callable[[ctypes.c_size_t], object] = linux_only.libc_function("malloc_trim", otherwise=id)
"""Exists in glibc only; elsewhere this has no effect."""


def trim_heap() -> None:
    """Returns the free pages of the heap to the system.

    Parsing and prepacking a model leave a quarter to more than half of its size in free pages, which the heap
    would keep.  Takes about ten milliseconds for a model of 200 MB: too long to do after each call.
    """
    _trim(ctypes.c_size_t(0))
