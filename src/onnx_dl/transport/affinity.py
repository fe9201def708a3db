"""Decides on which cores the worker's thread of a lane may run: any, or the one that its caller runs on.

A caller sleeps while its worker runs, so both can share a core, and a wake-up within a core costs 4 µs where
one across cores costs 20 to 40 (docs/performance.md).  But a thread that may run on one core only waits when
somebody else is busy there.  So both ways are tried, and the one is kept that the caller finds faster.  Only
the worker's thread is ever moved, never the application's.  Pure: who moves it is
:mod:`onnx_dl.transport.client_lane`.
"""

from __future__ import annotations

import statistics
from typing import Final

from onnx_dl.transport.spin import MOST

BLOCK: Final = 16
"""Calls after which a way is judged."""
RETRY: Final = 128
"""Blocks after which the other way is tried again, for one block: fewer than one call in a hundred."""

_LONGEST: Final = 2e6
"""Nanoseconds of a call for which a wake-up is not worth a thought."""
_GAIN: Final = 0.9
"""The other way must be faster by this factor."""


class Apart:
    """For callers who poll: they keep their core busy while they wait, so the worker runs on any other.

    Calls that take longer than anybody polls are left to the scheduler.  ``allowed``: the cores that the
    worker may run on, more than one.
    """

    def __init__(self, allowed: frozenset[int]) -> None:
        self._allowed = self._now = allowed

    def note(self, cpu: int, took: int) -> frozenset[int] | None:
        """Like :meth:`Placement.note`."""
        wanted = self._allowed if took > MOST * 1e9 else self._allowed - {cpu}
        if wanted == self._now:
            return None
        self._now = wanted
        return wanted


class Placement:
    """``allowed``: the cores that the worker may run on."""

    def __init__(self, allowed: frozenset[int]) -> None:
        self._allowed = self._now = allowed
        self._near = False
        self._seen: dict[bool, float] = {}
        """How long calls took the last time, near and not."""
        self._times: list[int] = []
        self._blocks = 0

    def note(self, cpu: int, took: int) -> frozenset[int] | None:
        """A caller on this core, whose last call took this many nanoseconds, calls.

        Returns:
            The cores to run on from now on; None: as before.
        """
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
