"""The first template, a fork of a supervisor that has just started.

Its imports take longest of all that a first call waits for.  So it begins before the supervisor imports what
only that needs, and takes over what both need.  Later templates are processes of their own
(:mod:`onnx_dl.supervisor.processes.spawn_queue`): by then the supervisor has threads and secrets.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final, NamedTuple

# What both need is imported here, before the fork: so it is imported once, and the memory is shared.
from onnx_dl.concurrency import spawning  # noqa: F401
from onnx_dl.protocol import codec, control, template  # noqa: F401
from onnx_dl.system import boot, resources
from onnx_dl.transport.sockets import Channel

# Set before numpy and onnxruntime are imported, which read it.  OpenBLAS would start a pool of threads, and
# onnxruntime 1.29 and later a telemetry thread (with an SQLite file that all forks would share).  A process
# with threads cannot fork safely.
SINGLE_THREADED: Final = {"OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}


class ForkedTemplate(NamedTuple):
    """A template that this process has forked, and the channel to it."""

    pid: int
    channel: Channel


def fork_template(mode: str) -> ForkedTemplate | None:
    """Forks the first template, before this process has read its orders: workers must not have its secret.

    ``mode``: as for :class:`.SpawnQueue`; empty: none is wanted yet.

    Returns:
        None: none is wanted, or not as a fork, or this process has more than one thread, or the system has no
            process or descriptor for it.  The next try is made when there are orders, and can be reported.
    """
    if mode != "fork" or not resources.has_one_thread():
        return None
    with contextlib.suppress(OSError):
        channel, theirs = Channel.pair()
        try:
            fd = os.dup(theirs.fileno())  # a descriptor that has an owner is closed in a forked child
            try:
                if (pid := os.fork()) == 0:
                    try:
                        boot.continue_as("template", fd, mode, environ=SINGLE_THREADED, keep=fd)
                    finally:  # a child that went on would read the supervisor's orders
                        os._exit(1)
            finally:
                os.close(fd)
            return ForkedTemplate(pid, channel)
        finally:
            theirs.close()
    return None
