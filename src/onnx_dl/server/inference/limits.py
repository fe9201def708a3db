"""Bounds of what waits and runs: requests of one version, and bytes of all requests, over all processes.

The counts lie in one page of memory that the processes of a server share: a row for each process, a column
for each version, and one for bytes.  A process writes to its own row only, and sums all.  It adds to its own
count first and compares the sum then, so a bound holds without a lock between processes; two that come at
once to the last place may both be refused.
"""

from __future__ import annotations

import collections
import mmap
import os
import threading
from typing import Final

from onnx_dl.server.interfaces import Served
from onnx_dl.server.v2.failures import too_large, too_many
from onnx_dl.system import resources

COLUMNS: Final = 1024
"""Words of a row: bytes in flight, and a count for each slot."""
_BYTES: Final = 0
_WORD: Final = 8
LEAST_QUEUE: Final = 64
"""Requests of one version that may wait or run at least, if nothing else is set."""
_UNKNOWN_MEMORY: Final = 4 << 30


def create_page(rows: int) -> int:
    """Return the descriptor of a new page for so many processes, all counts 0.  The caller closes it."""
    fd = os.memfd_create("onnx-dl-limits", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, rows * COLUMNS * _WORD)
    except BaseException:
        os.close(fd)
        raise
    return fd


def default_max_bytes(memory_limit: int | None) -> int:
    """Return the bytes of requests that may be in flight: a quarter of the memory limit, or of the machine's
    memory."""
    return (memory_limit or resources.memory() or _UNKNOWN_MEMORY) // 4


def queue_bound(entry: Served, default: int) -> int:
    """Return the number of requests of a version that may wait or run.  ``default``: the server's option; 0:
    it has none."""
    return entry.max_queue_size or default or max(LEAST_QUEUE, 4 * entry.max_batch_size)


class Limits:
    """The bounds, and this process's row of the page.  Thread-safe."""

    def __init__(
        self,
        max_bytes: int = 0,
        max_queue_size: int = 0,
        *,
        fd: int | None = None,
        row: int = 0,
        rows: int = 1,
    ) -> None:
        """
        Args:
            max_bytes: of all requests in flight; 0: a quarter of the machine's memory.
            max_queue_size: requests of one version that may wait or run; 0: see :func:`queue_bound`.
            fd: the page (:func:`create_page`), which the caller may close then; None: a page of its own.
            row: of this process.
            rows: of the page.
        """
        self.max_bytes = max_bytes or default_max_bytes(None)
        self._max_queue_size = max_queue_size
        self._rows = rows
        self._map = mmap.mmap(-1 if fd is None else fd, rows * COLUMNS * _WORD)
        self._words = memoryview(self._map).cast("q")
        self._first = row * COLUMNS
        self._lock = threading.Lock()
        self._changes: collections.deque[tuple[int, int]] = collections.deque()
        """Columns, and what is to be added to them."""

    def enter(self, entry: Served) -> int:
        """Count a request of this version in.  Return its column, for :meth:`leave`.

        Raises:
            RequestFailure: 429: too many of that version wait or run.
        """
        column = 1 + entry.slot % (COLUMNS - 1)
        bound = queue_bound(entry, self._max_queue_size)
        self._add(column, 1, waits=True)
        if self._sum(column) > bound:
            self._add(column, -1)
            raise too_many(f"{bound} requests of model '{entry.name}' wait or run, and it takes no more")
        return column

    def leave(self, column: int) -> None:
        """Count a request out."""
        self._add(column, -1)

    def take_bytes(self, nbytes: int) -> None:
        """Count the bytes of a request in.

        Raises:
            RequestFailure: 413: it alone is larger than the bound.  429: too many bytes are in flight.
        """
        if nbytes > self.max_bytes:
            raise too_large(f"a request of {nbytes} bytes is larger than the limit of {self.max_bytes}")
        self._add(_BYTES, nbytes, waits=True)
        if (total := self._sum(_BYTES)) > self.max_bytes:
            self._add(_BYTES, -nbytes)
            raise too_many(
                f"requests of {total - nbytes} bytes are in flight, and {nbytes} more exceed the limit of "
                f"{self.max_bytes}"
            )

    def add_bytes(self, nbytes: int) -> None:
        """Count bytes in that are there already, also beyond the bound: of an answer that is not read."""
        self._add(_BYTES, nbytes)

    def check_bytes(self) -> None:
        """Raise RequestFailure (429) if more bytes are in flight than may be: clients do not read answers."""
        if (total := self._sum(_BYTES)) > self.max_bytes:
            raise too_many(
                f"requests and answers of {total} bytes are in flight, and the limit is {self.max_bytes}"
            )

    def free_bytes(self, nbytes: int) -> None:
        """Count them out.  Finalizers may call this: it waits for nothing."""
        self._add(_BYTES, -nbytes)

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of all processes' requests."""
        return self._sum(_BYTES)

    def pending(self, entry: Served) -> int:
        """Return the requests of a version that wait or run, in all processes."""
        return self._sum(1 + entry.slot % (COLUMNS - 1))

    def clear(self, row: int) -> None:
        """Forget the counts of a process that is gone.  For the process that owns the page."""
        first = row * COLUMNS
        self._words[first : first + COLUMNS] = memoryview(bytes(COLUMNS * _WORD)).cast("q")

    def _sum(self, column: int) -> int:
        if self._rows == 1:
            return self._words[column]
        return sum(self._words[column::COLUMNS].tolist())

    def _add(self, column: int, change: int, *, waits: bool = False) -> None:
        """Add to a word of this process's row.  ``waits``: return when that is done.

        A finalizer may run between any two steps of a thread, also of one that has the lock.  So changes go
        to a deque first, and whoever has the lock makes them all; the loop closes the race in which a change
        comes after the last look of a thread that has the lock.
        """
        changes, words, first = self._changes, self._words, self._first
        changes.append((column, change))
        while changes and self._lock.acquire(blocking=waits):
            try:
                while changes:
                    column, change = changes.popleft()
                    words[first + column] += change
            finally:
                self._lock.release()
