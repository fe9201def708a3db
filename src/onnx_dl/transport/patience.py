"""For how long to look for a message before sleeping: pure, fed with how long messages took to come.

Only for callers who asked for it with ``latency="low"``.  Looking is worth it where messages come sooner than
a sleeper could be woken and back; who waits for longer shall not burn a core for it.
"""

from __future__ import annotations

from typing import Final

MOST: Final = 500e-6
"""Seconds after which anybody sleeps; an idle lane thus costs this once, and nothing after."""

_MARGIN: Final = 20e-6
_WEIGHT: Final = 1 / 8


class Patience:
    """Twice the usual wait, or nothing where that is more than :data:`MOST`."""

    def __init__(self) -> None:
        self._usual = MOST / 4

    @property
    def budget(self) -> float:
        """Seconds to look for the next message; 0.0: sleep at once."""
        budget = 2 * self._usual + _MARGIN
        return budget if budget <= MOST else 0.0

    def note(self, waited: float) -> None:
        """A message came after this many seconds.  A long silence counts little more than a short one, so
        that a stream that goes on after it is soon looked for again."""
        self._usual += (min(waited, 2 * MOST) - self._usual) * _WEIGHT
