"""Calls of several callers that run at a time, where that decides how they may be made.

When an input is bound to a session on a GPU, onnxruntime has a stream copy it, which it takes from a pool and
puts back at once, and does not wait.  The run that follows takes a stream from the pool, too.  That is the
same one, and its work comes after the copy, unless another call took it or put one back in between.  A
source that is pinned is copied while the run goes on, so such a run would compute with what is not there yet.
So calls that overlap are not made by binding: a plain run copies its inputs by its own stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

_FOR: Final = 0.25
"""Seconds for which calls that have overlapped are expected to overlap again."""
_TAKEN_WITHIN: Final = 0.05
"""Seconds after which a run has its stream for certain."""


class Overlaps:
    """Tells whether a call runs alone in its worker.  From any thread."""

    def __init__(self, in_flight: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        """``in_flight``: tells the number of calls, with the one that asks."""
        self._in_flight = in_flight
        self._clock = clock
        self._changed = threading.Condition()
        self._until = float("-inf")
        """Time until which no call is alone."""
        self._alone: int | None = None
        """Thread whose call was told that it is alone."""
        self._since = float("-inf")
        """Time at which it was told."""

    def begin(self) -> None:
        """Notes that a call has begun; before it uses the session.

        If another one was told that it is alone, this waits for its end, but not for long.
        """
        if self._in_flight() <= 1:
            return
        with self._changed:
            now = self._clock()
            self._until = now + _FOR
            if (left := self._since + _TAKEN_WITHIN - now) > 0:
                self._changed.wait_for(lambda: self._alone is None, left)

    def is_alone(self) -> bool:
        """True if no other call uses the session, until :meth:`end`."""
        with self._changed:
            now = self._clock()
            if self._in_flight() > 1 or now < self._until:
                return False
            self._alone, self._since = threading.get_ident(), now
            return True

    def end(self) -> None:
        """Notes the end of this thread's call."""
        if self._alone == threading.get_ident():
            with self._changed:
                self._alone = None
                self._changed.notify_all()


def may_bind(overlaps: Overlaps | None) -> bool:
    """Tells whether a call may be bound.  None: to a session that uses no GPU."""
    return overlaps is None or overlaps.is_alone()
