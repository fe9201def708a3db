"""Python imports this at the start of each process that has this folder in PYTHONPATH: lanes, lifelines and
the template's socket then have the smallest buffers that the kernel allows.
"""

import socket

from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.transport.sockets import Channel

_init = Channel.__init__


def _with_small_buffers(self: Channel, sock: socket.socket, *owner: Descriptor) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    _init(self, sock, *owner)


Channel.__init__ = _with_small_buffers  # type: ignore[method-assign]
