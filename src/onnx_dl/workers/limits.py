"""Limits after which a worker is replaced: ``max_memory`` and ``max_runs``."""

from __future__ import annotations

import itertools
import mmap
import os

from onnx_dl.system import procfs


class RecycleLimits:
    """Tells after each call whether the worker has to be replaced."""

    def __init__(self, nbytes: int | None, runs: int | None) -> None:
        """``nbytes``: anonymous memory, see :class:`AnonymousMemory`; None: no limit.

        Raises:
            PlatformError: there is a memory limit, and the system does not tell the figure.
        """
        self._nbytes = nbytes
        self._runs = runs
        self._calls = itertools.count(1)
        self._memory = None if nbytes is None else AnonymousMemory()

    def are_reached(self) -> bool:
        """Counts one call, and tells whether a limit is reached with it.  Takes 2 µs."""
        if self._runs is not None and next(self._calls) >= self._runs:
            return True
        return self._memory is not None and self._nbytes is not None and self._memory.read() > self._nbytes


class AnonymousMemory:
    """Resident memory of this process without pages of files and of shared memory, in bytes."""

    def __init__(self) -> None:
        """Opens the file with the figures; raises PlatformError if /proc is missing."""
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise procfs.missing("A limit of a worker's memory (max_memory, max_memory_hard)") from None

    def read(self) -> int:
        _, resident, shared, *_ = os.pread(self._statm, 128, 0).split()
        nbytes: int = (int(resident) - int(shared)) * mmap.PAGESIZE
        return nbytes
