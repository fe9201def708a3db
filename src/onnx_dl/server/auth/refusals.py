"""Refused requests, told at a bounded rate: whoever guesses tokens must not fill a disk with lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

EVERY: Final = 10.0
"""Seconds between two lines about one peer."""
_MOST_PEERS: Final = 100
"""Peers that are told apart within :data:`EVERY` seconds; the others share one line."""


class Refusals:
    """Tells each peer's first refusal at once, and the number of the others later.  Thread-safe."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """``tell``: prints one line."""
        self._tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._counts: dict[str, int] = {}
        """Refusals of each peer since the present period began."""

    def note(self, peer: str, what: str) -> None:
        """Counts a refusal.  ``peer``: an address, without the port; ``what``: a noun phrase, no secret."""
        lines = []
        with self._lock:
            if self._clock() >= self._since + EVERY:
                lines += [f"{count - 1} more from {who}" for who, count in self._counts.items() if count > 1]
                self._counts.clear()
                self._since = self._clock()
            who = peer or "an unknown peer"
            if who not in self._counts and len(self._counts) >= _MOST_PEERS:
                who = "other peers"
            self._counts[who] = self._counts.get(who, 0) + 1
            if self._counts[who] == 1:
                lines.append(f"{what} from {who}")
        for line in lines:
            self._tell(f"refused requests: {line}.")
