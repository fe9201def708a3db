"""For whom a supervisor runs, and when it ends because nobody uses it."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

from onnx_dl.supervisor.policy.idle_shutdown import IdleExit
from onnx_dl.transport import running_hosts
from onnx_dl.transport.rendezvous import HostEntry


class HostRole(NamedTuple):
    """For whom a supervisor runs, and how it was started."""

    place: HostEntry | None = None
    """Files by which applications find a shared host; None: it serves only one application."""
    foreground: bool = False
    """It was started by hand: it stays without clients, and prints events on stdout."""
    explicit: Sequence[str] = ()
    """Names of settings that were given as arguments, which the host's file does not change."""
    application: int | None = None
    """Descriptor that is readable when the application of a private supervisor is gone."""

    @property
    def is_shared(self) -> bool:
        return self.place is not None


class Lifetime:
    """Decides when to end: no client came in time, a shared host is unused, or another one replaces it."""

    def __init__(self, role: HostRole, linger: float, expected_until: float) -> None:
        """``expected_until``: when to give up if no client has come; ``linger``: as for IdleExit."""
        self._place = role.place
        self.application = role.application
        self._idle_exit = IdleExit(linger, expected_until, managed=role.foreground)
        self._ends_at: float | None = expected_until

    def on_client(self) -> None:
        self._ends_at = None
        self._idle_exit.on_client()

    def on_application_gone(self) -> None:
        if self.application is not None:
            os.close(self.application)
            self.application = None

    def update(self, now: float, *, clients: bool, models: bool) -> None:
        """Looks again at a shared host: whether it has clients, and holds models itself."""
        if self._place is not None:
            look = functools.partial(running_hosts.reason_to_leave, self._place)
            self._ends_at = self._idle_exit.ends_at(now, clients=clients, models=models, look=look)

    def next_deadline(self, *, closing: bool) -> float | None:
        look_at = None if closing else self._idle_exit.look_at
        return min((at for at in (look_at, self._ends_at) if at is not None), default=None)

    def is_over(self, now: float) -> bool:
        """True, once, if the host is to end now."""
        if self._ends_at is None or now < self._ends_at:
            return False
        self._ends_at = None
        return True

    @property
    def replaced_because(self) -> str | None:
        """Why another host replaces this one; None: none does."""
        return self._idle_exit.follower
