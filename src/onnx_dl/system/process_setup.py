"""What a process inherits from whoever starts it, and what it makes its own of that.

An application may have blocked or ignored signals, closed its standard streams, or lost its working
directory.  None of this may decide whether our processes work and end.  The umask and the other limits stay
the application's, because workers write files for it.  Imports nothing heavy: it runs first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Final

from onnx_dl.system import descriptor_limits

_KEPT: Final = {signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ}
"""Signals that stay ignored where they are: by nohup, and by Python itself."""


def make_own() -> None:
    """The first thing in every process of ours: standard streams, signals and the number of descriptors."""
    fill_standard_streams()
    _open_streams()
    _reset_signals()
    descriptor_limits.raise_limit()


def fill_standard_streams() -> None:
    """Opens the null device as those of the descriptors 0, 1 and 2 that are closed, as daemons do.

    For the application, too, before the first descriptor is made for it: that would get such a number, and
    what the program prints would go into it.

    Raises:
        OSError: this process may have no more descriptors.
    """
    if not all(map(_is_open, range(3))):
        # The lowest free number is taken each time, so nobody's descriptor is replaced.
        while (fd := nothing()) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)


def nothing() -> int:
    """A descriptor of the null device.  In a chroot without one: of a pipe that nobody writes to, which is at
    its end, and cannot be written to.

    Raises:
        OSError: this process may have no more descriptors.
    """
    with contextlib.suppress(FileNotFoundError, PermissionError):
        return os.open(os.devnull, os.O_RDWR)
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_streams() -> None:
    """Python has None for streams that were closed when it started."""
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = open(fd, mode, errors="backslashreplace", closefd=False)  # noqa: SIM115 - stays open
            setattr(sys, name, stream)


def _reset_signals() -> None:
    """No signal is blocked, and none is ignored that another process chose to ignore."""
    for number in signal.valid_signals() - _KEPT:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # Our processes are in the background: a terminal with `stty tostop` would stop them when they write.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def go_first(score: int) -> None:
    """When memory is short, the kernel ends this process sooner than others that need as much.

    Args:
        score: what ``oom_score_adj`` is at least from now on, at most 1000, where a system allows it.
    """
    with contextlib.suppress(OSError, ValueError):
        adjustment = Path("/proc/self/oom_score_adj")
        if int(adjustment.read_text()) < score:
            adjustment.write_text(str(score))


def search_path() -> list[str]:
    """``sys.path`` for another process, which has another working directory.

    Where the present one was removed, entries that are relative to it lead nowhere and are left out.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = ""
    entries = [os.fspath(entry) for entry in sys.path if isinstance(entry, str | os.PathLike)]
    return [os.path.normpath(os.path.join(here, entry)) for entry in entries if here or os.path.isabs(entry)]


def started_at(pid: int) -> int | None:
    """When a process began, in clock ticks since the system did; None: there is none, or nobody tells.

    A process id means another process once the first one is gone; this number then differs.
    """
    try:
        told = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(told.rpartition(")")[2].split()[19])


def watch(pid: int, started: int | None) -> int | None:
    """A descriptor that is readable when this process is gone.  None: there is no way to watch it.

    Raises:
        ProcessLookupError: it is gone already.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None
    if started is not None and started_at(pid) != started:  # it has the number of one that is gone
        os.close(fd)
        raise ProcessLookupError(f"Process {pid} is gone.")
    return fd
