"""Sockets without the ways of Python's: no warning, no timeout, no number of their own."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from onnx_dl.concurrency import primitives

if TYPE_CHECKING:
    import socket


class Face(primitives.socket):
    """Python's functions for a socket that a :class:`~onnx_dl.system.owned_descriptors.Descriptor` closes.  Where the garbage
    collector finds both in one cycle, Python would warn of a socket that nobody closed."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes over the number of ``sock``, which has none afterwards.  What waits has no timeout, whatever
        the program told ``socket.setdefaulttimeout``."""
        super().__init__(sock.family, sock.type, sock.proto, sock.fileno())
        sock.detach()
        self.setblocking(True)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never made
            self.detach()
