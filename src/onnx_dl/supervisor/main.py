"""Entry point of the supervisor process.

The application that starts it writes one JSON object to its stdin (:class:`Orders`) and waits for one byte on
a pipe, ``!``, which says that the sockets are bound, or for a text that says why they are not.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from typing import Final

import msgspec

from onnx_dl.config import Settings
from onnx_dl.errors import OnnxDLError
from onnx_dl.supervisor.process import Processes

_PR_SET_CHILD_SUBREAPER: Final = 36


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor is told at its start.  ``secret`` is why this does not travel in ``argv``."""

    address: str
    secret: str
    sys_path: list[str]
    settings: Settings
    ready_fd: int


def main() -> None:
    """Runs a supervisor until its last client is gone."""
    orders = msgspec.json.decode(sys.stdin.buffer.read(), type=Orders)
    _detach()
    processes = Processes(orders.sys_path, orders.settings.start)
    # Imported while the template imports in its own process.
    from onnx_dl.supervisor.loop import Supervisor

    try:
        supervisor = Supervisor(processes, orders.address, orders.secret, orders.settings)
    except OnnxDLError as error:
        processes.close()
        os.write(orders.ready_fd, str(error).encode()[: select.PIPE_BUF])
        sys.exit(1)
    os.write(orders.ready_fd, b"!")
    os.close(orders.ready_fd)
    supervisor.run()


def _detach() -> None:
    """Lets go of the application's stdin and directory, and takes in orphans.

    If the template dies, its workers become children of this process, so that they are reaped.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir("/")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
