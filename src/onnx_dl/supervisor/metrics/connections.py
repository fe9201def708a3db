"""Limits of the page of metrics: number of connections, time for each, and allowed Host headers.

Knows neither sockets nor clocks.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Hashable
from typing import Final

MOST: Final = 16
"""Connections at once."""


class ScrapeConnections:
    """Connections, each with its deadline.  Thread-safe."""

    def __init__(self, timeout: float, most: int = MOST) -> None:
        """``timeout``: seconds for a request to arrive, and again for the answer to be taken."""
        self._timeout = timeout
        self._most = most
        self._asking: dict[Hashable, float] = {}
        """Deadlines of connections without a complete request, oldest first."""
        self._answered: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def accept(self, who: Hashable, now: float) -> tuple[bool, Hashable | None]:
        """Returns true if it is accepted, and the connection closed for it: the oldest without a request."""
        with self._lock:
            slowest = None
            if len(self._asking) + len(self._answered) >= self._most:
                slowest = next(iter(self._asking), None)
                if slowest is None:
                    return False, None
                del self._asking[slowest]
            self._asking[who] = now + self._timeout
            return True, slowest

    def on_request(self, who: Hashable, now: float) -> None:
        """Notes that its request has arrived."""
        with self._lock:
            if self._asking.pop(who, None) is not None:
                # The loop has as long to answer as the scraper to take the answer.
                self._answered[who] = now + 2 * self._timeout

    def on_closed(self, who: Hashable) -> None:
        """Forgets a closed connection."""
        with self._lock:
            self._asking.pop(who, None)
            self._answered.pop(who, None)

    def overdue(self, now: float) -> list[Hashable]:
        """Connections whose deadline has passed; each is returned once."""
        with self._lock:
            late = [who for group in self._groups for who, at in group.items() if at <= now]
            for group in self._groups:
                for who in late:
                    group.pop(who, None)
            return late

    def next_deadline(self) -> float | None:
        with self._lock:
            return min((at for group in self._groups for at in group.values()), default=None)

    @property
    def _groups(self) -> tuple[dict[Hashable, float], dict[Hashable, float]]:
        return self._asking, self._answered


def is_allowed_host(host_header: str | None, names: frozenset[str]) -> bool:
    """Checks by its Host header that a request is for this page.

    In DNS rebinding, a page in a browser gives its own name our address.  The browser then sends that name,
    and would show the metrics to that page.  IP addresses are allowed, and programs that send no header: they
    are not browsers.
    """
    if host_header is None:
        return True
    name = host_header.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") <= 1:
        name = name.partition(":")[0]
    try:
        return name.rstrip(".") in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
