"""Where /proc is not mounted, as in a bare chroot: what is known all the same, and what is said of the rest.

Most of what is read there is left out then.  Imports nothing heavy, because every process of ours begins
with it.
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
    """Whether this process finds itself there."""
    return os.path.exists("/proc/self/statm")


def missing(what: str) -> PlatformError:
    """The error for ``what`` cannot be had without it, such as "max_memory"."""
    return PlatformError(
        f"{what} needs /proc, to see how much memory a process has, and it is not mounted here. Mount it "
        f"(mount -t proc proc /proc) or set no such limit; everything else works without."
    )


def has_one_thread() -> bool:
    """Whether this process has no other thread, of any library.  False, too, where nobody tells."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task")) == 1
    # To leave the other threads has no effect where there are none, and is refused where there are.
    return bool(ctypes.CDLL(None).unshare(_CLONE_THREAD) == 0)


def is_eventfd(fd: int) -> bool:
    """Whether this is an eventfd."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    # Of the files that are of no kind, it is the only one that one may write to.  This adds 0 to its count.
    with contextlib.suppress(OSError):
        return stat.S_IFMT(os.fstat(fd).st_mode) == 0 and os.write(fd, bytes(8)) == 8
    return False
