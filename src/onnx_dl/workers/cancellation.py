"""Cancellation of a running call, requested by its caller over another lane.

The request has the call's number, so that one that comes after the end of the call cancels no other call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class CancelToken:
    """Cancellation of one lane's present call: its thread attaches a function that ends it, any may
    cancel."""

    __slots__ = ("_cancelled", "_end", "_lock", "_number")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._cancelled = -1
        self._end: Callable[[], object] | None = None

    def begin(self, number: int) -> None:
        """Sets the number of the caller's request that begins now."""
        self._number = number

    def attach(self, end: Callable[[], object] | None) -> None:
        """Sets the function that ends the present call, if any; calls it if that was cancelled before."""
        with self._lock:
            self._end = end
            if end is not None and self._cancelled == self._number:
                end()

    def detach(self) -> None:
        """Forgets that function: the call has ended."""
        with self._lock:
            self._end = None

    @property
    def is_cancelled(self) -> bool:
        """Tells whether the present call was cancelled."""
        return self._cancelled == self._number

    def cancel(self, number: int) -> None:
        """Ends the request of this number, now or as soon as it begins."""
        with self._lock:
            self._cancelled = number
            if self._end is not None and self._number == number:
                self._end()
