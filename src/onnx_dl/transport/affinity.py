"""Choice of the cores on which the worker's thread of a lane may run: on any, or on its caller's core.

A caller sleeps while its worker runs, so both can share a core.  A wake-up within a core costs 4 µs, one
across cores 20 to 40 µs (docs/performance.md).  But a thread that is bound to one core waits while another
thread is busy there.  So both ways are tried, and the faster one for the caller is kept.  Only the worker's
thread is moved, never the application's.  Pure: :mod:`onnx_dl.transport.client_lane` moves the thread.
"""

from __future__ import annotations

import statistics
from typing import Final

from onnx_dl.transport.doorbell import LONGEST_SPIN

BLOCK: Final = 16
"""Calls after which the present way is judged."""
RETRY: Final = 128
"""Blocks after which the other way is tried again for one block: less than one call in a hundred."""

_LONGEST: Final = 2e6
"""Nanoseconds of a call beside which a wake-up does not matter."""
_GAIN: Final = 0.9
"""Factor by which the other way must be faster."""


class SeparateAffinity:
    """Keeps the worker off the core of a caller that polls, which keeps that core busy while it waits.  Calls
    that take longer than a caller polls are left to the scheduler.  ``allowed``: the cores that the worker
    may run on, more than one."""

    def __init__(self, allowed: frozenset[int]) -> None:
        self._allowed = self._now = allowed

    def note(self, cpu: int, took: int) -> frozenset[int] | None:
        """See :meth:`MeasuredAffinity.note`."""
        wanted = self._allowed if took > LONGEST_SPIN * 1e9 else self._allowed - {cpu}
        if wanted == self._now:
            return None
        self._now = wanted
        return wanted


class MeasuredAffinity:
    """Tries the caller's core and all cores, and keeps the faster.  ``allowed``: the worker's cores."""

    def __init__(self, allowed: frozenset[int]) -> None:
        self._allowed = self._now = allowed
        self._near = False
        self._seen: dict[bool, float] = {}
        """Median duration of the last calls on the caller's core (True) and on all cores."""
        self._times: list[int] = []
        self._blocks = 0

    def note(self, cpu: int, took: int) -> frozenset[int] | None:
        """Record a call from core ``cpu`` whose predecessor took this many nanoseconds.  Return the cores to
        run on from now on; None: no change."""
        self._times.append(took)
        if len(self._times) == BLOCK:
            self._judge(statistics.median(self._times))
            self._times.clear()
        wanted = frozenset((cpu,)) if self._near and cpu in self._allowed else self._allowed
        if wanted == self._now:
            return None
        self._now = wanted
        return wanted

    def _judge(self, usual: float) -> None:
        self._seen[self._near] = usual
        self._blocks += 1
        other = self._seen.get(not self._near)
        if usual > _LONGEST:
            self._near = False
        elif other is None or self._blocks >= RETRY:
            self._near, self._blocks = not self._near, 0
        elif other < _GAIN * usual:
            self._near = not self._near


Affinity = SeparateAffinity | MeasuredAffinity
