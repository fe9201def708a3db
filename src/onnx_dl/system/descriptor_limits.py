"""File descriptors: how many this process may have, how many are left, and what is said when there are none.

Imports nothing heavy, because every process of ours begins with it.  Who is refused is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Final

from onnx_dl.errors import DescriptorsExhausted

MOST: Final = 65_536
"""That a process of ours asks for; more would only make the kernel's table larger."""


def raise_limit() -> None:
    """Raises the soft limit of this process to the hard one, to :data:`MOST` at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it; then fewer must do
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """How many this process may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST * 16 if soft == resource.RLIM_INFINITY else soft


def free() -> int:
    """How many more this process can have.  Takes 2 µs, and longer before Linux 6.2."""
    return max(0, limit() - _open())


def _open() -> int:
    try:
        # Since Linux 6.2 the size of this folder is the number of descriptors.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:  # not even one to look with, or no /proc
        return _counted()


def _counted() -> int:
    """How many are open, found by asking for each."""
    count = 0
    for fd in range(min(limit(), MOST)):
        with contextlib.suppress(OSError):
            os.fstat(fd)
            count += 1
    return count


def exhausted(what: str) -> DescriptorsExhausted:
    """The error for ``what`` cannot be had, such as "A worker for m.onnx"; says which limit it was."""
    return DescriptorsExhausted(
        f"{what} needs more file descriptors than process {os.getpid()} has left; it may have {limit()}. "
        "What is loaded goes on. Raise the limit of open files of the application before it starts (ulimit "
        "-n, LimitNOFILE= of a service; the hard one counts for processes of onnx-dl), or unload models."
    )
