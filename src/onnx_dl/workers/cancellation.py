"""How a call that runs is told to end: by whoever made it, over another lane.

Covers the race between that word and the end of the call: a number says which call is meant, so a word that
comes late ends no other one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Halt:
    """Of one lane.  The lane's thread attaches what ends its present call; any thread may ask for the end."""

    __slots__ = ("_asked", "_end", "_lock", "_number")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._asked = -1
        self._end: Callable[[], object] | None = None

    def begin(self, number: int) -> None:
        """The caller's request of this number begins."""
        self._number = number

    def attach(self, end: Callable[[], object] | None) -> None:
        """What ends the present call, if it can be ended; called at once if that was asked for already."""
        with self._lock:
            self._end = end
            if end is not None and self._asked == self._number:
                end()

    def detach(self) -> None:
        """The call has ended by itself."""
        with self._lock:
            self._end = None

    @property
    def was_asked(self) -> bool:
        """Whether the present call was to end."""
        return self._asked == self._number

    def ask(self, number: int) -> None:
        """The request of this number is to end, now or as soon as it begins."""
        with self._lock:
            self._asked = number
            if self._end is not None and self._number == number:
                self._end()
