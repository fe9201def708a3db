"""A worker's counters in one page of memory that it shares with the supervisor.

They say how many calls it answered, how long these took, how many are running, and when it was used last.
The worker writes; the supervisor reads at any time, also after the worker is gone.  Each word has one writer
at a time and is written at once, so a reader needs no lock; two words may be of two moments.
"""

from __future__ import annotations

import math
import mmap
import os
from typing import Final, NamedTuple

from onnx_dl.linux_only import fcntl

_SIZE: Final = 4096
_BUSY, _LAST_USED, _TOTAL, _EXCEEDED = range(1, 5)
"""Indices of words.  The second and third are floating-point numbers."""
_FIRST: Final = 8
"""Index of the first word of the histogram."""
_STEPS: Final = 4
"""Buckets per doubling, as in an HDR histogram: a quantile read from them is at most a quarter too large."""
_LONGEST: Final = (1 << 42) - 1
"""Nanoseconds (73 minutes); longer calls count as this."""
BUCKETS: Final = (_LONGEST.bit_length() - 2) * _STEPS


class Reading(NamedTuple):
    """The counters at one moment.  ``last_used`` is in monotonic seconds, 0.0 if there was no use."""

    runs: int = 0
    busy: int = 0
    """Calls and ``session()`` blocks that are running."""
    last_used: float = 0.0
    total: float = 0.0
    """Seconds of all calls together, in the worker."""
    exceeded: int = 0
    """Bytes that the worker had when it ended itself for exceeding its limit; 0: it did not."""
    latencies: tuple[int, ...] = ()
    """Number of calls in each bucket; see :func:`bound`."""

    def quantile(self, q: float) -> float | None:
        """Return the seconds within which this share of all calls was answered; None: there were no calls."""
        wanted = q * sum(self.latencies)
        for index, count in enumerate(self.latencies):
            wanted -= count
            if count and wanted <= 0:
                return bound(index)
        return None


def bucket(nanoseconds: int) -> int:
    """Return the index of the bucket that counts a call of this duration."""
    if not 4 <= nanoseconds <= _LONGEST:
        nanoseconds = 4 if nanoseconds < 4 else _LONGEST
    shift = nanoseconds.bit_length() - 3
    return shift * _STEPS + ((nanoseconds >> shift) & (_STEPS - 1))


def bound(index: int) -> float:
    """Return the upper bound of a bucket, in seconds."""
    width, step = divmod(index, _STEPS)
    return ((_STEPS + step + 1) << width) / 1e9


def _checked(seconds: float) -> float:
    """0.0 for what is no time: a worker may write anything, and nothing can be compared with NaN."""
    return seconds if 0.0 <= seconds < math.inf else 0.0


class Gauges:
    """The counters in a page.  Without ``words`` they are private to this process."""

    def __init__(self, words: memoryview[int] | None = None) -> None:
        if words is None:
            words = memoryview(bytearray(8 * (_FIRST + BUCKETS))).cast("Q")
        self._words = words
        self._numbers = words[:_FIRST].cast("B").cast("d")
        """The same words as floating-point numbers."""
        self.busy = words[_BUSY : _BUSY + 1]
        """One word: the number of running calls and blocks."""
        self._total = 0.0  # a new page has zeros, and reading it takes time

    # --- in the worker, one thread at a time --------------------------------------------------------------

    def used(self, at: float, count: int) -> None:
        """Set the time of the last use, in monotonic seconds, and the number of running calls and blocks."""
        self._numbers[_LAST_USED] = at
        self._words[_BUSY] = count

    def answered(self, at: float, count: int, seconds: float) -> None:
        """Do what :meth:`used` does, and count one call and its duration."""
        words, numbers = self._words, self._numbers
        numbers[_LAST_USED] = at
        words[_BUSY] = count
        words[_FIRST + bucket(int(seconds * 1e9))] += 1
        self._total = numbers[_TOTAL] = self._total + seconds

    def exceeded(self, nbytes: int) -> None:
        """Record that the worker ends itself because it has this many bytes."""
        self._words[_EXCEEDED] = nbytes

    def release(self) -> None:
        """Let go of the page, which cannot be closed before."""
        for view in (self._numbers, self.busy, self._words):
            view.release()

    # --- in the supervisor --------------------------------------------------------------------------------

    def read(self) -> Reading:
        words, numbers = self._words, self._numbers
        latencies = tuple(words[_FIRST : _FIRST + BUCKETS])
        return Reading(
            sum(latencies),
            words[_BUSY],
            _checked(numbers[_LAST_USED]),
            _checked(numbers[_TOTAL]),
            words[_EXCEEDED],
            latencies,
        )


class Page:
    """Shared memory for :class:`Gauges`: the supervisor makes it and sends the worker a descriptor; each
    closes its own."""

    def __init__(self, fd: int | None = None) -> None:
        """``fd``: the descriptor of an existing page, of which this takes ownership; None: makes a page.
        Raises OSError if the system has no descriptor or memory left."""
        made = None
        try:
            if fd is None:
                fd = made = os.memfd_create("onnx-gauges", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.truncate(fd, _SIZE)
                # A worker that shortened it would end the supervisor by SIGBUS.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            self._page = mmap.mmap(fd, _SIZE)
        except OSError:
            if made is not None:
                os.close(made)
            raise
        self.fd = fd
        self.gauges = Gauges(memoryview(self._page).cast("Q"))

    def close(self) -> None:
        self.gauges.release()
        self._page.close()
        os.close(self.fd)
