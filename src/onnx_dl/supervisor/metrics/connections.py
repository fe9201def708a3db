"""Who is connected to the page of metrics: how many at once, how long each may take, and for whom it is.

Knows neither sockets nor clocks.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Hashable
from typing import Final

MOST: Final = 16
"""Connections at once."""


class Scrapers:
    """Connections, each with the moment at which it must be done.  Thread-safe."""

    def __init__(self, patience: float, most: int = MOST) -> None:
        """``patience``: seconds for a request to come, and as many for the answer to be taken."""
        self._patience = patience
        self._most = most
        self._asking: dict[Hashable, float] = {}
        """Those whose request is not there yet, in the order in which they came."""
        self._answered: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def came(self, who: Hashable, now: float) -> tuple[bool, Hashable | None]:
        """Whether it is let in, and who makes way: the first that came of those who have not asked yet."""
        with self._lock:
            slowest = None
            if len(self._asking) + len(self._answered) >= self._most:
                slowest = next(iter(self._asking), None)
                if slowest is None:
                    return False, None
                del self._asking[slowest]
            self._asking[who] = now + self._patience
            return True, slowest

    def has_asked(self, who: Hashable, now: float) -> None:
        """Its request is there."""
        with self._lock:
            if self._asking.pop(who, None) is not None:
                # The loop has as long to answer as the scraper to take it.
                self._answered[who] = now + 2 * self._patience

    def left(self, who: Hashable) -> None:
        """It is gone."""
        with self._lock:
            self._asking.pop(who, None)
            self._answered.pop(who, None)

    def overdue(self, now: float) -> list[Hashable]:
        """Who is to be cut off; each is told of once."""
        with self._lock:
            late = [who for group in self._groups for who, at in group.items() if at <= now]
            for group in self._groups:
                for who in late:
                    group.pop(who, None)
            return late

    def next_deadline(self) -> float | None:
        """When somebody will be overdue; None: nobody is there."""
        with self._lock:
            return min((at for group in self._groups for at in group.values()), default=None)

    @property
    def _groups(self) -> tuple[dict[Hashable, float], dict[Hashable, float]]:
        return self._asking, self._answered


def is_meant(host_header: str | None, names: frozenset[str]) -> bool:
    """Whether a request is for this page, by its Host header.

    A browser that was told that some page's name has our address (DNS rebinding) sends that name, and would
    show that page what is here.  Names of addresses say nothing, and programs that send none are no browsers.
    """
    if host_header is None:
        return True
    name = host_header.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") <= 1:
        name = name.partition(":")[0]
    return name.rstrip(".") in names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
