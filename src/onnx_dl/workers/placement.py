"""Decides on which cores the thread of a lane may run: any, or the one that its caller runs on.

A caller sleeps while its worker runs, so both can share a core, and a wake-up within a core costs 4 µs where
one across cores costs 20 (docs/performance.md).  But a thread that may run on one core only waits when
somebody else is busy there.  So both ways are tried, and the one is kept that the caller finds faster.  Pure:
fed with what callers leave in the lane's page.
"""

from __future__ import annotations

import collections
import statistics
from typing import Final

SAMPLE: Final = 32
"""Calls after which a way is judged."""
SETTLED: Final = 4096
"""Calls after which the other way is tried again."""

_LONGEST: Final = 2e6
"""Nanoseconds of a call for which a wake-up is not worth a thought."""
_GAIN: Final = 0.9


class Placement:
    """``allowed``: the cores that the worker may run on."""

    def __init__(self, allowed: frozenset[int]) -> None:
        self._allowed = self._now = allowed
        self._near = False
        self._best: float | None = None
        """Of the way that is not in use now, while both are compared."""
        self._times: collections.deque[int] = collections.deque(maxlen=SAMPLE)
        self._left = SAMPLE

    def note(self, cpu: int, took: int) -> frozenset[int] | None:
        """A caller on this core, whose last call took this many nanoseconds, calls.

        Returns:
            The cores to run on from now on; None: as before.
        """
        self._times.append(took)
        self._left -= 1
        if not self._left:
            self._judge(statistics.median(self._times))
        wanted = frozenset((cpu,)) if self._near and cpu in self._allowed else self._allowed
        if wanted == self._now:
            return None
        self._now = wanted
        return wanted

    def _judge(self, usual: float) -> None:
        """A sample is complete: settle, or try the other way."""
        if self._best is None:
            self._try_other(usual)
        elif self._is_better(usual):
            self._best, self._left = None, SETTLED
        else:
            self._near, self._best, self._left = not self._near, None, SETTLED

    def _try_other(self, usual: float) -> None:
        if usual < _LONGEST:
            self._near, self._best, self._left = not self._near, usual, SAMPLE
        else:
            self._near, self._left = False, SETTLED

    def _is_better(self, usual: float) -> bool:
        """Whether the way in use is better than the other.  To be near must pay; to be free is the rule."""
        assert self._best is not None
        return usual < _GAIN * self._best if self._near else _GAIN * usual < self._best
