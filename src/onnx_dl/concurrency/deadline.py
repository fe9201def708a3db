"""Time at which a caller goes on, with or without an answer.

A :class:`Deadline` is made once, where a call enters, and passed to every wait below it: the host's start,
room, load, a lane, its opening, the reply, the end of the run, the question how the worker ended.  So all
waits of one call share one time.
"""

from __future__ import annotations

import time
from typing import Final

_LOOK_EVERY: Final = 0.05
"""Seconds between two looks at a deadline that another thread may bring forward."""


class DeadlinePassed(TimeoutError):
    """A wait ended at its deadline.  ``what``: noun phrase for the thing that was waited for."""

    def __init__(self, what: str) -> None:
        super().__init__(f"timed out while it waited for {what}")
        self.what = what


class Deadline:
    """Thread-safe.  None in place of a Deadline means that the caller waits for as long as it takes."""

    __slots__ = ("_at", "_ended", "_movable", "_outer", "timeout")

    def __init__(
        self, timeout: float | None, *, outer: Deadline | None = None, movable: bool = False
    ) -> None:
        """``timeout``: seconds from now; None: none of its own.  ``outer``: passes no later than this one.
        ``movable``: another thread may call :meth:`end`, which waits notice within 50 ms."""
        self.timeout = timeout
        self._at = None if timeout is None else time.monotonic() + timeout
        self._outer = outer
        self._movable: bool = movable or (outer is not None and outer._movable)
        self._ended = False

    @classmethod
    def of(cls, timeout: float | None) -> Deadline | None:
        """Deadline of a caller's ``timeout``; None if it has none."""
        return None if timeout is None else cls(timeout)

    def end(self) -> None:
        """Ends every wait now."""
        self._ended = True

    @property
    def passed(self) -> bool:
        return self.left() == 0.0

    def left(self, at_most: float | None = None) -> float | None:
        """Seconds until it passes, 0.0 if it has, ``at_most`` if that is sooner; None: neither."""
        if self._ended:
            return 0.0
        left = at_most if self._outer is None else self._outer.left(at_most)
        if self._at is None:
            return left
        own = max(0.0, self._at - time.monotonic())
        return own if left is None else min(own, left)

    def step(self, at_most: float | None = None) -> float | None:
        """Like :meth:`left`, and no longer than until the deadline must be looked at again."""
        left = self.left(at_most)
        if self._movable:
            return _LOOK_EVERY if left is None else min(left, _LOOK_EVERY)
        return left

    def check(self, what: str) -> None:
        """Raises :class:`DeadlinePassed` if it has passed."""
        if self.passed:
            raise DeadlinePassed(what)
