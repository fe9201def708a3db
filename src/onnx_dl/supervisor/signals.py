"""Signals as numbers that can be read from a descriptor, and what they mean to a supervisor."""

from __future__ import annotations

import os
import signal
from typing import NamedTuple

from onnx_dl.supervisor.lifetime import HostRole


class Reaction(NamedTuple):
    """Response of a supervisor to signals."""

    reload: bool
    """Read the host's file again."""
    end: bool
    returns: bool = False
    """Another host is expected to follow: the record of this one stays, so that clients wait for it."""


def reaction(signals: set[int], role: HostRole, *, has_file: bool) -> Reaction:
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
        """Descriptor that is readable when a signal has arrived."""
        return self._read_end

    def arrived(self) -> set[int]:
        """Numbers of the signals that have arrived since the last call."""
        try:
            return set(os.read(self._read_end, 4096))
        except BlockingIOError:
            return set()
