"""Role of a supervisor, and the time when it ends: by a signal, or because no client uses it."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from typing import Final, NamedTuple

from onnx_dl.transport import running_hosts
from onnx_dl.transport.rendezvous import HostEntry

LOOK_EVERY: Final = 5.0
"""Seconds after which a host without clients looks again for a host that replaces it."""


class HostRole(NamedTuple):
    """Clients of a supervisor, and the way it was started."""

    place: HostEntry | None = None
    """Files by which applications find a shared host; None: it serves only one application."""
    foreground: bool = False
    """True if it was started by hand: it stays without clients, and prints events on stdout."""
    explicit: Sequence[str] = ()
    """Names of settings that were given as arguments, which the host's file does not change."""
    application: int | None = None
    """Descriptor that is readable when the application of a private supervisor is gone, or the server whose
    host this is."""

    @property
    def is_shared(self) -> bool:
        return self.place is not None


class Lifetime:
    """Decides when to end: no client came in time, a shared host is unused, or another one replaces it.

    A shared host ends when it had neither clients nor models of its own for as long as it lingers; one in the
    foreground stays for ever.  If another host replaces it, it ends at once, whatever it holds: its models
    are wanted in the other host.
    """

    def __init__(self, role: HostRole, linger: float, expected_until: float) -> None:
        """``expected_until``: until when the first client, which may have started it, may come."""
        self.application = role.application
        self.ends_at: float | None = expected_until
        """Time to end if nothing changes; None: it stays."""
        self.look_at: float | None = None
        """Time to call :meth:`update` again; None: when clients come or go."""
        self.replaced_because: str | None = None
        """Reason why another host replaces this one; None: none does."""
        self._place = role.place
        self._stays = role.foreground
        self._linger = linger
        self._expected_until = expected_until
        self._unused_until: float | None = expected_until

    def on_client(self) -> None:
        """A client has come, even if it is gone again before :meth:`update` is called."""
        self.ends_at = self.look_at = self.replaced_because = self._unused_until = None
        self._expected_until = -math.inf

    def on_application_gone(self) -> None:
        if self.application is not None:
            os.close(self.application)
            self.application = None

    def update(self, now: float, *, clients: bool, models: bool) -> None:
        """Looks again at a shared host: whether it has clients, holds models itself, and is replaced."""
        if self._place is None:
            return
        if clients:
            self.on_client()
            return
        if self.look_at is None or now >= self.look_at:
            self.look_at = now + LOOK_EVERY
            self.replaced_because = running_hosts.reason_to_leave(self._place)
        if self.replaced_because is not None and now >= self._expected_until:
            self.ends_at = now
            return
        if self._stays or models:
            self._unused_until = None
        elif self._unused_until is None:
            self._unused_until = now + self._linger
        self.ends_at = self._unused_until

    def next_deadline(self, *, closing: bool) -> float | None:
        look_at = None if closing else self.look_at
        return min((at for at in (look_at, self.ends_at) if at is not None), default=None)

    def is_over(self, now: float) -> bool:
        """True, once, if the host is to end now."""
        if self.ends_at is None or now < self.ends_at:
            return False
        self.ends_at = None
        return True


class Reaction(NamedTuple):
    """Response of a supervisor to signals."""

    reload: bool
    """Read the host's file again."""
    end: bool
    returns: bool = False
    """Another host is expected to follow: the record of this one stays, so that clients wait for it."""


def reaction_to(signals: set[int], role: HostRole, *, has_file: bool) -> Reaction:
    """Decides what signals mean.

    SIGHUP reloads the host's file.  Without a file, it ends a private supervisor, and one in the foreground.
    """
    reload = has_file and signal.SIGHUP in signals
    endings = {signal.SIGTERM}
    if role.is_shared:
        endings.add(signal.SIGINT)
    if not has_file and (role.foreground or not role.is_shared):
        endings.add(signal.SIGHUP)
    # SIGTERM in the foreground comes from a service manager, which may start the next host.
    returns = role.is_shared and role.foreground and not signals & {signal.SIGINT, signal.SIGHUP}
    return Reaction(reload, bool(signals & endings), returns)


class SignalPipe:
    """Catches signals of this process's main thread from now on."""

    def __init__(self, foreground: bool) -> None:
        """``foreground``: whether Ctrl-C is meant for this process."""
        self._read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                signal.signal(number, lambda *_: None)
        if not foreground:
            # The terminal sends Ctrl-C to the whole process group; the application handles it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def fileno(self) -> int:
        return self._read_end

    def arrived(self) -> set[int]:
        """Numbers of the signals that have arrived since the last call."""
        try:
            return set(os.read(self._read_end, 4096))
        except BlockingIOError:
            return set()
