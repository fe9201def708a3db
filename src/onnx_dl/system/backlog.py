"""What threads that write for people have in common: a terminal that was stopped keeps nobody else waiting.

A supervisor writes its own lines (:mod:`onnx_dl.supervisor.outlet`), an application those of its workers
(:mod:`onnx_dl.client.worker_output`).  How their threads are fed is theirs.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import Final

from onnx_dl.concurrency import waits
from onnx_dl.system import owned_descriptors

MOST: Final = 1 << 20
"""Bytes that wait to be written; more is dropped, and said so."""


def dropped(nbytes: int) -> bytes:
    """The line that says so."""
    return f"onnx-dl: {nbytes} bytes were not written: nobody reads this\n".encode()


def write(fd: int, data: bytes) -> None:
    """All of it, or nothing more once nobody is there to read it.  Nothing into a descriptor of ours: the
    program may have closed what had this number before."""
    with contextlib.suppress(OSError, ValueError):
        while data and not owned_descriptors.is_ours(fd):
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:  # the program has made it so, also for whoever inherited it
                waits.ready(fd, select.POLLOUT, None)
