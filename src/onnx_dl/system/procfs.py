"""Substitutes and errors for systems without /proc, such as a bare chroot.

Imports nothing heavy: every process of ours imports it first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from typing import Final

from onnx_dl.errors import PlatformError

_CLONE_THREAD: Final = 0x10000


def is_mounted() -> bool:
    """Returns whether /proc has this process."""
    return os.path.exists("/proc/self/statm")


def missing(what: str) -> PlatformError:
    """The error for a feature that needs /proc; ``what``: its name, such as "max_memory"."""
    return PlatformError(
        f"{what} needs /proc, to read the memory of processes, and it is not mounted here. Mount it "
        f"(mount -t proc proc /proc) or set no such limit; everything else works without it."
    )


def has_one_thread() -> bool:
    """Returns whether this process has exactly one thread.  False if that cannot be found out."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task")) == 1
    # unshare(CLONE_THREAD) has no effect in a process of one thread, and fails in others.
    return bool(ctypes.CDLL(None).unshare(_CLONE_THREAD) == 0)


def is_eventfd(fd: int) -> bool:
    """Returns whether this is an eventfd."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    # Of the anonymous inodes only an eventfd can be written to.  This adds 0 to its counter.
    with contextlib.suppress(OSError):
        return stat.S_IFMT(os.fstat(fd).st_mode) == 0 and os.write(fd, bytes(8)) == 8
    return False
