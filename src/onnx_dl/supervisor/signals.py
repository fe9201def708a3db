"""Signals, as numbers that can be read from a descriptor."""

from __future__ import annotations

import os
import signal


class Wakeups:
    """Hears signals from now on, in this process's main thread."""

    def __init__(self, foreground: bool) -> None:
        """``foreground``: Ctrl-C is for this process."""
        self._read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                signal.signal(number, lambda *_: None)
        if not foreground:
            # Ctrl-C goes to the whole group; it is the application's.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def fileno(self) -> int:
        """Readable when a signal has arrived."""
        return self._read_end

    def arrived(self) -> set[int]:
        """The numbers of those that have."""
        try:
            return set(os.read(self._read_end, 4096))
        except BlockingIOError:
            return set()
