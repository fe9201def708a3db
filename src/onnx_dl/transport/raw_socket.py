"""Python's socket object without ownership of its descriptor."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from onnx_dl.concurrency import primitives

if TYPE_CHECKING:
    import socket


class Face(primitives.socket):
    """Methods of a socket that a :class:`~onnx_dl.system.owned_descriptors.Descriptor` closes.  No warning of an unclosed socket
    where the garbage collector finds both in one cycle."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes over the descriptor of ``sock``, which has none afterwards.  Waits have no timeout, whatever
        the program has set by ``socket.setdefaulttimeout``."""
        super().__init__(sock.family, sock.type, sock.proto, sock.fileno())
        sock.detach()
        self.setblocking(True)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never made
            self.detach()
