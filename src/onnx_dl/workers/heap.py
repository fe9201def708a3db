"""What keeps a live worker's private memory near that of its model.

Covers the heap after a load, and the pages that a forked worker shares with the template.  What ends when the
process ends is not looked after here.  docs/performance.md has what was measured and what was not kept.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import os
from collections.abc import Callable

from onnx_dl.system import procfs

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


class Allowance:
    """What a worker may use before another takes its place."""

    def __init__(self, nbytes: int | None, runs: int | None) -> None:
        """``nbytes``: of memory of its own, pages that it shares with others not counted."""
        self._nbytes = nbytes
        self._runs = runs
        self._made = itertools.count(1)
        self._own = None if nbytes is None else Own()

    def is_used_up(self) -> bool:
        """Whether it is, with the call that has just ended.  Takes 2 µs."""
        if self._runs is not None and next(self._made) >= self._runs:
            return True
        return self._own is not None and self._nbytes is not None and self._own() > self._nbytes


class Own:
    """Bytes of memory that are this process's own: pages of files and of shared memory not counted."""

    def __init__(self) -> None:
        """Raises PlatformError where nobody tells."""
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise procfs.missing("A limit of a worker's memory (max_memory, max_memory_hard)") from None

    def __call__(self) -> int:
        _, resident, shared, *_ = os.pread(self._statm, 128, 0).split()
        own: int = (int(resident) - int(shared)) * mmap.PAGESIZE
        return own
