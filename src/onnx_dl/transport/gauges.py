"""What a worker tells of itself without being asked: one page that it shares with the supervisor.

Covers how many calls it answered and how long they took, what is under way, and when it was used last.  The
worker writes, the supervisor reads whenever somebody wants to know, also after the worker is gone.  Each word
has one writer at a time and is written whole, so a reader needs no lock; two words may be of two moments.
"""

from __future__ import annotations

import mmap
import os
from typing import Final, NamedTuple

_SIZE: Final = 4096
_RUNS, _BUSY, _LAST_USED, _TOTAL, _EXCEEDED = range(5)
_FIRST: Final = 8
"""The word in which the histogram begins."""
_STEPS: Final = 4
"""Buckets per doubling, as in an HDR histogram: a quantile read from them is at most a quarter too large."""
_LONGEST: Final = (1 << 42) - 1
"""Nanoseconds, 73 minutes; what takes longer counts as that."""
BUCKETS: Final = (_LONGEST.bit_length() - 2) * _STEPS


class Reading(NamedTuple):
    """A worker at one moment.  ``last_used`` is in monotonic seconds, 0.0 if it was never used."""

    runs: int = 0
    busy: int = 0
    """Calls and ``session()`` blocks under way."""
    last_used: float = 0.0
    total: float = 0.0
    """Seconds that all calls took together, in the worker."""
    exceeded: int = 0
    """Bytes that it had when it ended itself because it may not have so many; 0: it did not."""
    latencies: tuple[int, ...] = ()
    """Numbers of calls by :func:`bound`."""

    def quantile(self, q: float) -> float | None:
        """Seconds within which this share of all calls was answered; None: there was none."""
        wanted = q * sum(self.latencies)
        for index, count in enumerate(self.latencies):
            wanted -= count
            if count and wanted <= 0:
                return bound(index)
        return None


def bucket(nanoseconds: int) -> int:
    """Where a call that took so long is counted."""
    if not 4 <= nanoseconds <= _LONGEST:
        nanoseconds = 4 if nanoseconds < 4 else _LONGEST
    shift = nanoseconds.bit_length() - 3
    return shift * _STEPS + ((nanoseconds >> shift) & (_STEPS - 1))


def bound(index: int) -> float:
    """The seconds below which calls in this bucket stayed."""
    width, step = divmod(index, _STEPS)
    return ((_STEPS + step + 1) << width) / 1e9


class Gauges:
    """The words.  Without a page of their own they are seen by their owner only."""

    def __init__(self, words: list[int] | memoryview[int] | None = None) -> None:
        self._words: list[int] | memoryview[int] = [0] * (_FIRST + BUCKETS) if words is None else words
        self._total = self._runs = 0  # a page is new, and to read it takes time

    # --- in the worker, one thread at a time --------------------------------------------------------------

    def under_way(self, count: int) -> None:
        """So many calls and blocks are, now."""
        self._words[_BUSY] = count

    def used(self, at: float, count: int) -> None:
        """The model was used at this monotonic time, and so many calls and blocks are under way."""
        words = self._words
        words[_LAST_USED] = int(at * 1e9)
        words[_BUSY] = count

    def answered(self, seconds: float) -> None:
        """One more call was, within so many seconds."""
        nanoseconds = int(seconds * 1e9)
        words = self._words
        words[_FIRST + bucket(nanoseconds)] += 1
        self._total += nanoseconds
        self._runs += 1
        words[_TOTAL] = self._total
        words[_RUNS] = self._runs

    def exceeded(self, nbytes: int) -> None:
        """The worker ends itself because it has so many bytes."""
        self._words[_EXCEEDED] = nbytes

    # --- in the supervisor --------------------------------------------------------------------------------

    def read(self) -> Reading:
        words = self._words
        return Reading(
            words[_RUNS],
            words[_BUSY],
            words[_LAST_USED] / 1e9,
            words[_TOTAL] / 1e9,
            words[_EXCEEDED],
            tuple(words[_FIRST : _FIRST + BUCKETS]),
        )


class Page:
    """Shared memory for :class:`Gauges`: made by the supervisor, handed to the worker as a descriptor, closed
    by whoever has it."""

    def __init__(self, fd: int | None = None) -> None:
        """``fd``: of a page that was handed over, which is taken over; None: makes one.

        Raises:
            OSError: the system has no descriptor or memory left.
        """
        made = None
        try:
            if fd is None:
                fd = made = os.memfd_create("onnx-gauges", os.MFD_CLOEXEC)
                os.truncate(fd, _SIZE)
            self._page = mmap.mmap(fd, _SIZE)
        except OSError:
            if made is not None:
                os.close(made)
            raise
        self.fd = fd
        self._words = memoryview(self._page).cast("Q")
        self.gauges = Gauges(self._words)

    def close(self) -> None:
        self._words.release()
        self._page.close()
        os.close(self.fd)
