"""Writes to terminals and pipes from a thread, so that a stopped reader blocks nothing else.

A supervisor writes its own lines (:mod:`onnx_dl.supervisor.outlet`), an application those of its workers
(:mod:`onnx_dl.client.worker_output`).
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import Final

from onnx_dl.concurrency import waits
from onnx_dl.system import owned_descriptors

MOST: Final = 1 << 20
"""Bytes that may wait to be written; more is dropped, and reported."""


def dropped(nbytes: int) -> bytes:
    """The line that reports dropped bytes."""
    return f"onnx-dl: {nbytes} bytes were not written: nobody reads this\n".encode()


def write(fd: int, data: bytes) -> None:
    """Writes all bytes, or stops if the reader is gone.

    Writes nothing to a descriptor of onnx-dl: the program may have closed the one that had this number.
    """
    with contextlib.suppress(OSError, ValueError):
        while data and not owned_descriptors.is_ours(fd):
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:  # made non-blocking by the program, or by another that shares it
                waits.ready(fd, select.POLLOUT, None)
