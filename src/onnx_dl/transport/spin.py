"""For how long to look for a message before sleeping: pure, fed with how long messages took to come.

Only for callers who asked for it with ``latency="low"``.  Looking is worth it where messages come sooner than
a sleeper could be woken and back; who waits for longer shall not burn a core for it.
"""

from __future__ import annotations

from typing import Final

MOST: Final = 300e-6
"""Seconds after which anybody sleeps; an idle lane thus costs this once, and nothing after."""

_WORTH: Final = 0.8 * MOST
"""Far above what polling takes where it works: a sleeper's waits are longer by two wake-ups, and must not
keep it asleep."""
_MARGIN: Final = 20e-6
_WEIGHT: Final = 1 / 8


class Patience:
    """Twice the usual wait, at most :data:`MOST`; nothing where that would not do."""

    def __init__(self) -> None:
        self._usual = MOST / 4

    @property
    def budget(self) -> float:
        """Seconds to look for the next message; 0.0: sleep at once."""
        return min(2 * self._usual + _MARGIN, MOST) if self._usual < _WORTH else 0.0

    def note(self, waited: float) -> None:
        """A message came after this many seconds.  A long silence counts little more than a short one, so
        that a stream that goes on after it is soon looked for again."""
        self._usual += (min(waited, 2 * MOST) - self._usual) * _WEIGHT
