"""File descriptors: the limit of this process, how many are left, and the error if none are.

Imports nothing heavy: every process of ours imports it first.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from onnx_dl.errors import DescriptorsExhausted
from onnx_dl.linux_only import resource, soft_limit

MOST: Final = 65_536
"""The most that a process of ours asks for; more would only enlarge the kernel's table."""


def raise_limit() -> None:
    """Raises the soft limit of this process to the hard one, but not above :data:`MOST`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """The number of descriptors that this process may have."""
    soft = soft_limit("RLIMIT_NOFILE")
    return MOST * 16 if soft is None else soft


def free() -> int:
    """The number of descriptors that are left.  Takes 2 µs, and longer before Linux 6.2."""
    return max(0, limit() - _open())


def _open() -> int:
    try:
        # Since Linux 6.2 the size of this folder is the number of descriptors.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:  # no descriptor left to read the folder with, or no /proc
        return sum(map(is_open, range(min(limit(), MOST))))


def is_open(fd: int) -> bool:
    """Returns whether this is the number of an open descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def exhausted(what: str) -> DescriptorsExhausted:
    """The error if there are no descriptors for ``what``, such as "A worker for m.onnx"."""
    return DescriptorsExhausted(
        f"{what} needs more file descriptors than process {os.getpid()} has left; it may have {limit()}. "
        "Loaded models continue to work. Raise the limit of open files before the application starts (ulimit "
        "-n, LimitNOFILE= of a service; the hard one counts for processes of onnx-dl), or unload models."
    )
