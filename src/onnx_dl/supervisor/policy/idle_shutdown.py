"""When a shared host ends that nobody uses: pure, told what is so and when.

Covers hosts that applications share; a private one ends with its application.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

LOOK_EVERY: Final = 5.0
"""Seconds after which a host without clients looks again whether it has a follower."""


class Solitude:
    """How long a host stays without clients.

    Until it has been without clients and without models of its own for as long as it lingers; one that is
    kept in the foreground stays for ever.  Where another host follows it, it ends at once, whatever it has:
    the models that it holds are wanted in the other one.
    """

    def __init__(self, linger: float, expected_until: float, *, kept: bool) -> None:
        """``expected_until``: when the first client, who may have started it, has come or will not come."""
        self.follower: str | None = None
        """Why it is not needed any more; None: it is, as far as was looked."""
        self._linger = linger
        self._kept = kept
        self._expected_until = expected_until
        self._until: float | None = expected_until
        self._look_at = -math.inf

    def ends_at(
        self, now: float, *, clients: bool, models: bool, look: Callable[[], str | None]
    ) -> float | None:
        """When it is to end if nothing changes; None: not for this.

        Args:
            models: it holds models itself.
            look: finds why it is not needed any more, if so.
        """
        if clients:
            self.on_client()
            return None
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY
            self.follower = look()
        if self.follower is not None and now >= self._expected_until:
            return now
        if self._kept or models:
            self._until = None
        elif self._until is None:
            self._until = now + self._linger
        return self._until

    @property
    def look_at(self) -> float | None:
        """When :meth:`ends_at` is to be asked again; None: when clients come or go."""
        return None if math.isinf(self._look_at) else self._look_at

    def on_client(self) -> None:
        """One has come.  To be told also of one that is gone again before :meth:`ends_at` is asked."""
        self.follower = self._until = None
        self._expected_until = self._look_at = -math.inf
