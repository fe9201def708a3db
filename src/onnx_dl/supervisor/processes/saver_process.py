"""The process that saves a model for the load cache (:mod:`onnx_dl.workers.saver`), and its children."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from onnx_dl import linux_only
from onnx_dl.system import boot
from onnx_dl.tensors import segment

_PROCESS_MRELEASE: Final = 448
"""Number of the system call (Linux 5.15 and later) on all architectures."""


class SaverProcess:
    """One saver: a child of this process, in its own process group."""

    def __init__(self, environment: Mapping[str, str], order: str, blob: int | None, memory: int) -> None:
        """``blob``: descriptor of a model given as bytes; ``memory``: bytes that it may use.

        Raises:
            OSError: the system has no process for it, or no memory.
        """
        fds = [segment.freeze(order.encode()), *([] if blob is None else [os.dup(blob)])]
        try:
            for fd in fds:
                os.set_inheritable(fd, True)
            numbers = (fds[0], -1 if blob is None else fds[1], os.getpid(), memory)
            launch = boot.launch("saver", *numbers, environ=environment)
            self._pid = os.posix_spawn(*launch, setpgroup=0)
        finally:
            for fd in fds:
                os.close(fd)
        self._status = 0

    def reaped(self, pid: int, status: int) -> None:
        """Notes the wait status, if the child that has ended is this one."""
        if pid == self._pid:
            self._status = status

    def ended(self) -> int | None:
        """The wait status; None while it or one of its children lives.  Orphaned children are ours."""
        try:
            os.waitid(os.P_PGID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return self._status
        return None

    def kill(self) -> None:
        """Sends SIGKILL to all its processes, and frees their memory at once."""
        members = [self._pid, *_children(self._pid)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        for pid in members:
            _release_memory(pid)

    def wait(self) -> None:
        """Reaps all its processes after :meth:`kill`."""
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self._pid, 0)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has just ended, or the kernel has no such file
        return []


def _release_memory(pid: int) -> None:
    """Frees the memory of a process that is being killed.

    At idle priority it would take seconds to exit by itself when all processors are busy.
    """
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        linux_only.libc().syscall(_PROCESS_MRELEASE, fd, 0)
        os.close(fd)
