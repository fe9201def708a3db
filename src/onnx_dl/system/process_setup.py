"""Set-up of our processes, so that they do not depend on what they inherit from their parent.

An application may have blocked or ignored signals, closed its standard streams, or lost its working
directory.  Our processes must work and end all the same.  The umask and the other limits stay as the
application has them, because workers write files for it.  Imports nothing heavy: it runs first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Final

from onnx_dl import linux_only
from onnx_dl.system import descriptor_limits

_KEPT: Final = linux_only.signals("SIGHUP", "SIGPIPE", "SIGXFSZ")
"""Signals that stay ignored if they are: by nohup, and by Python itself."""
_PR_SET_PDEATHSIG: Final = 1


def set_up_process() -> None:
    """Sets up standard streams, signals and the descriptor limit.  Called first in every process of ours."""
    fill_standard_streams()
    _open_streams()
    _reset_signals()
    descriptor_limits.raise_limit()


def fill_standard_streams() -> None:
    """Opens the null device for each of the descriptors 0, 1 and 2 that is closed, as daemons do.

    Also called in the application before we open a descriptor there: ours would get such a number, and the
    application's output would be written into it.

    Raises:
        OSError: this process has no more descriptors.
    """
    if not all(map(descriptor_limits.is_open, range(3))):
        # open() takes the lowest free number, so no open descriptor is replaced.
        while (fd := open_null()) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)


def open_null() -> int:
    """A descriptor of the null device.  In a chroot without it: of a pipe that is at its end, read-only.

    Raises:
        OSError: this process has no more descriptors.
    """
    with contextlib.suppress(FileNotFoundError, PermissionError):
        return os.open(os.devnull, os.O_RDWR)
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


def _open_streams() -> None:
    """Opens the Python streams that are None because they were closed when Python started."""
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            stream = open(fd, mode, errors="backslashreplace", closefd=False)  # noqa: SIM115 - stays open
            setattr(sys, name, stream)


def _reset_signals() -> None:
    """Unblocks all signals, and resets those that are ignored by inheritance."""
    for number in signal.valid_signals() - _KEPT:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # A terminal with `stty tostop` would stop our processes, which are in the background, when they write.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def raise_oom_score(score: int) -> None:
    """Makes the kernel kill this process before others of the same size when memory runs out.

    ``score``: the least value of ``oom_score_adj`` from now on, at most 1000.  Ignored if it is refused.
    """
    with contextlib.suppress(OSError, ValueError):
        adjustment = Path("/proc/self/oom_score_adj")
        if int(adjustment.read_text()) < score:
            adjustment.write_text(str(score))


def search_path() -> list[str]:
    """``sys.path`` with absolute entries, for a process with another working directory.

    Relative entries are left out if the working directory was removed.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = ""
    entries = [os.fspath(entry) for entry in sys.path if isinstance(entry, str | os.PathLike)]
    return [os.path.normpath(os.path.join(here, entry)) for entry in entries if here or os.path.isabs(entry)]


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None: no such process, or not known.

    It tells whether a process id belongs to the same process as before, or was used again.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(line.rpartition(")")[2].split()[19])


def watch_process(pid: int, started: int | None) -> int | None:
    """A pidfd, which becomes readable when this process ends; None: pidfds are refused.

    ``started``: its :func:`start_time`.

    Raises:
        ProcessLookupError: it has ended already.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None
    if started is not None and start_time(pid) != started:  # another process has the number now
        os.close(fd)
        raise ProcessLookupError(f"Process {pid} has ended.")
    return fd


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends; exits at once if ``parent`` has ended already.

    The signal comes when the *thread* that started this process ends, so parents use their main thread.
    """
    linux_only.libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent not in (None, os.getppid()):
        os._exit(0)
