"""Decides how long to poll for a message before sleeping.  Pure: it is told how long messages took to come.

Only for callers with ``latency="low"``.  Polling helps if messages come sooner than a sleeping thread could
be woken; a caller that waits longer must not burn a core.
"""

from __future__ import annotations

from typing import Final

MOST: Final = 300e-6
"""Seconds after which every waiter sleeps: the price that an idle lane pays once."""

_WORTH: Final = 0.8 * MOST
"""Usual wait from which on polling stops.  Far above the waits of one that polls: the waits of a sleeper are
longer by two wake-ups, and must not keep it asleep."""
_MARGIN: Final = 20e-6
_WEIGHT: Final = 1 / 8


class Patience:
    """Polls for twice the usual wait, at most :data:`MOST`; not at all if that would be too short."""

    def __init__(self) -> None:
        self._usual = MOST / 4

    @property
    def budget(self) -> float:
        """Seconds to poll for the next message; 0.0: sleep at once."""
        return min(2 * self._usual + _MARGIN, MOST) if self._usual < _WORTH else 0.0

    def note(self, waited: float) -> None:
        """Record that a message came after this many seconds.  A long silence counts little more than a short
        one, so that polling resumes soon after it."""
        self._usual += (min(waited, 2 * MOST) - self._usual) * _WEIGHT
