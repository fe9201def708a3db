"""Decides when a shared host ends that nobody uses.  A private host ends with its application."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

LOOK_EVERY: Final = 5.0
"""Seconds after which a host without clients looks again for a host that replaces it."""


class IdleExit:
    """Time at which a shared host ends.

    It ends when it had neither clients nor models of its own for as long as it lingers.  A managed host, in
    the foreground, stays for ever.  If another host replaces it, it ends at once, whatever it holds: its
    models are wanted in the other host.
    """

    def __init__(self, linger: float, expected_until: float, *, managed: bool) -> None:
        """``expected_until``: until when the first client, which may have started the host, may come."""
        self.follower: str | None = None
        """Why the host is not needed any more; None: it is needed, as far as is known."""
        self._linger = linger
        self._managed = managed
        self._expected_until = expected_until
        self._until: float | None = expected_until
        self._look_at = -math.inf

    def ends_at(
        self, now: float, *, clients: bool, models: bool, look: Callable[[], str | None]
    ) -> float | None:
        """When the host is to end if nothing changes; None: it stays.

        Args:
            clients: it has clients.
            models: it holds models itself.
            look: returns why it is not needed any more, or None.
        """
        if clients:
            self.on_client()
            return None
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY
            self.follower = look()
        if self.follower is not None and now >= self._expected_until:
            return now
        if self._managed or models:
            self._until = None
        elif self._until is None:
            self._until = now + self._linger
        return self._until

    @property
    def look_at(self) -> float | None:
        """When to call :meth:`ends_at` again; None: when clients come or go."""
        return None if math.isinf(self._look_at) else self._look_at

    def on_client(self) -> None:
        """A client has come, even if it is gone again before :meth:`ends_at` is called."""
        self.follower = self._until = None
        self._expected_until = self._look_at = -math.inf
