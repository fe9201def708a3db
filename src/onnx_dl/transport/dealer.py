"""An application's end of the control socket: a ZeroMQ DEALER without libzmq.

libzmq has threads that sleep on descriptors of its own.  When a program closes these (``os.closerange``),
libzmq reads from and writes to files of the program, or ends the process.  Here there is no thread, and one
descriptor, which is checked before it is used.  Used by one thread.
"""

from __future__ import annotations

import select
import socket
from typing import Final

from onnx_dl import linux_only
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.transport import sockets, zmtp

_CHUNK: Final = 1 << 18
_NO_SIGNAL: Final = linux_only.flags(socket, "MSG_NOSIGNAL")


class Dealer:
    """Connected to a ROUTER, which knows it by its name."""

    def __init__(self, address: str, name: bytes, deadline: Deadline) -> None:
        """Raises DeadlinePassed if the router's queue stays full, and OSError."""
        self._address = address
        self._name = name
        self._connect(deadline)

    def _connect(self, deadline: Deadline) -> None:
        self._sock, self._descriptor = sockets.connected(socket.SOCK_STREAM, self._address, deadline)
        self._sock.setblocking(False)
        self._reader = zmtp.FrameReader()
        self._unsent = bytearray(zmtp.GREETING + zmtp.ready(Socket_Type=b"DEALER", Identity=self._name))
        self.gone = False
        """True if the router has ended the connection."""
        self._flush()

    def reconnect(self, deadline: Deadline) -> None:
        """Connects again after the router closed the connection early; raises like the constructor."""
        self.close()
        self._connect(deadline)

    def fileno(self) -> int:
        return self._descriptor.number

    def is_ours(self) -> bool:
        """True if the program has not closed the descriptor."""
        return self._descriptor.holds()

    @property
    def is_let_in(self) -> bool:
        """True if messages may be sent; before, the router may drop the connection with them."""
        return self._reader.identity is not None

    @property
    def awaits(self) -> int:
        """Events to poll for."""
        return select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN

    def send(self, data: bytes) -> None:
        """Sends as much as the router takes now, and the rest in the next :meth:`receive`."""
        self._unsent += zmtp.frame(data)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent and not self.gone and self.is_ours():
                # Released at once: gc.get_objects() in another thread keeps the views that it finds, and
                # bytes with views cannot be removed.
                with memoryview(self._unsent) as unsent, unsent[:_CHUNK] as chunk:
                    sent = self._sock.send(chunk, _NO_SIGNAL)
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._end()

    def receive(self) -> list[bytes]:
        """The messages that have come; does not wait."""
        found: list[bytes] = []
        try:
            while not self.gone and self.is_ours():
                if not (data := self._sock.recv(_CHUNK)):
                    self._end()
                found += self._reader.feed(data)
        except BlockingIOError:
            pass
        except (OSError, ProtocolError):
            self._end()
        self._flush()
        return found

    def _end(self) -> None:
        self.gone = True
        self._unsent.clear()

    def close(self) -> None:
        """Drops unsent messages.  May be called twice."""
        self._sock.detach()  # Python's object would close the number, whatever file has it now
        self._descriptor.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()
